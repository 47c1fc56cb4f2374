"""What each category has done so far, and what that means for its next look-up: suspended, relaxed, or neither."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from random import Random
from typing import TypeVar

from covey.policy.break_even import BreakEven, BreakEvenConfig
from covey.policy.entry_bound import EntryBounds
from covey.policy.false_hits import Estimate, FalseHits
from covey.policy.relaxation import Relaxation, RelaxationBudget, RelaxationConfig
from covey.policy.reuse import CategoryPolicy, ReuseMode
from covey.types.semcache import CategoryStats

K = TypeVar("K")
V = TypeVar("V")

MODELS_MAX = 64
PENDING_MAX = 4096
SERVED_MAX = 16_384


@dataclass(frozen=True, slots=True, kw_only=True)
class AccountsConfig:
    """How accounts are kept: the share of semantic hits that is judged, break-even and relaxation."""

    judge_share: float = 0.02
    break_even: BreakEvenConfig = BreakEvenConfig()
    relaxation: RelaxationConfig = RelaxationConfig()


@dataclass(slots=True)
class Account:
    """One category's figures and the policies that live by them."""

    policy: CategoryPolicy
    false_hits: FalseHits
    break_even: BreakEven
    budget: RelaxationBudget
    bounds: EntryBounds | None
    lookups: int = 0
    hits: int = 0
    relaxed_hits: int = 0
    stale_hits: int = 0
    relaxations: OrderedDict[str, Relaxation] = field(default_factory=OrderedDict)

    @property
    def mode(self) -> ReuseMode:
        """What the category does now."""
        suspended = self.policy.mode is ReuseMode.SEMANTIC and self.break_even.is_suspended
        return ReuseMode.EXACT if suspended else self.policy.mode

    @property
    def can_relax(self) -> bool:
        """Whether load may change anything here."""
        policy = self.policy
        return bool(policy.d_tau or policy.beta or policy.model is not None) and not self.budget.is_spent

    def estimate(self) -> Estimate:
        """The share of wrong ones among the semantic hits."""
        return self.false_hits.estimate()


@dataclass(frozen=True, slots=True)
class Served:
    """A semantic hit that may still be judged."""

    category: str
    similarity: float


class Accounts:
    """The accounts of all categories; every table is bounded. Owned by the event loop."""

    def __init__(self, policies: Iterable[CategoryPolicy], config: AccountsConfig, rng: Random) -> None:
        self._config = config
        self._rng = rng
        self._accounts = {policy.name: self._open(policy) for policy in policies}
        self._asked: OrderedDict[bytes, float] = OrderedDict()
        self._served: OrderedDict[str, Served] = OrderedDict()

    def __getitem__(self, category: str) -> Account:
        return self._accounts[category]

    def __iter__(self) -> Iterator[Account]:
        return iter(self._accounts.values())

    def degree(self, category: str, model: str, load: float, now: float) -> float:
        """How far `load` of the model behind relaxes the category now, 0 to 1; 0 once its budget is spent."""
        account = self._accounts[category]
        relaxation = account.relaxations.get(model)
        if relaxation is None:
            relaxation = account.relaxations[model] = Relaxation(self._config.relaxation)
        account.relaxations.move_to_end(model)
        while len(account.relaxations) > MODELS_MAX:
            account.relaxations.popitem(last=False)
        degree = relaxation.observe(load, now)
        return degree if account.can_relax else 0.0

    def looked_up(self, category: str, key: bytes, *, hit: bool, overhead_s: float, now: float) -> None:
        """Account a semantic look-up; for a miss, remember since when the model computes the answer."""
        self._accounts[category].break_even.looked_up(hit=hit, overhead_s=overhead_s)
        if not hit:
            _remember(self._asked, key, now, PENDING_MAX)

    def answered(self, category: str, key: bytes, now: float) -> None:
        """The answer of an earlier miss is there: what it took is what a hit would have saved."""
        asked = self._asked.pop(key, None)
        if asked is not None:
            self._accounts[category].break_even.answered(model_s=now - asked)

    def served(self, category: str, entry: str, similarity: float, *, relaxed: bool) -> bool:
        """Account a semantic hit; returns whether it is to be judged."""
        account = self._accounts[category]
        account.hits += 1
        account.relaxed_hits += relaxed
        _remember(self._served, entry, Served(category, similarity), SERVED_MAX)
        return account.false_hits.is_sampled(self._rng.random())

    def verdict(self, category: str, entry: str, *, wrong: bool, stale: bool = False) -> None:
        """Take a verdict on a semantic hit of `entry`; a stale answer was the right one once."""
        account = self._accounts.get(category)
        if account is None:
            return
        account.stale_hits += stale
        account.false_hits.observe(wrong=wrong)
        account.budget.observe(account.estimate())
        served = self._served.get(entry)
        if account.bounds is not None and served is not None and not stale:
            account.bounds.observe(entry, served.similarity, right=not wrong)

    def was_served(self, entry: str) -> str:
        """The category in which an entry was a semantic hit of late; empty when it was none."""
        served = self._served.get(entry)
        return served.category if served is not None else ""

    def stats(self, entries: dict[str, tuple[int, int]]) -> tuple[CategoryStats, ...]:
        """Return the figures of every category; `entries` are entries and bytes by category."""
        return tuple(_stats(account, *entries.get(name, (0, 0))) for name, account in sorted(self._accounts.items()))

    def _open(self, policy: CategoryPolicy) -> Account:
        return Account(
            policy=policy,
            false_hits=FalseHits(sample=self._config.judge_share),
            break_even=BreakEven(self._config.break_even),
            budget=RelaxationBudget(policy.false_hits_max),
            bounds=EntryBounds(policy.delta) if policy.delta > 0 else None,
        )


def _stats(account: Account, entries: int, size_bytes: int) -> CategoryStats:
    estimate = account.estimate()
    return CategoryStats(
        category=account.policy.name,
        mode=account.mode.value,
        entries=entries,
        size_bytes=size_bytes,
        lookups=account.lookups,
        hits=account.hits,
        relaxed_hits=account.relaxed_hits,
        judged=account.false_hits.verdicts,
        false_hits=estimate.share,
        false_hits_low=estimate.low,
        false_hits_high=estimate.high,
        stale_hits=account.stale_hits,
        threshold=account.policy.model.cut if account.policy.model is not None else account.policy.tau,
    )


def _remember(table: OrderedDict[K, V], key: K, value: V, most: int) -> None:
    table[key] = value
    table.move_to_end(key)
    while len(table) > most:
        table.popitem(last=False)
