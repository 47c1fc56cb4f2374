"""Which worker takes a request: what it holds of the prompt against how busy it is; and whether to split."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from covey.types.ids import WorkerId

from .kv_cost import KvCost, Took


class Split(StrEnum):
    """Whether prefill and decode run on two workers."""

    NEVER = "never"
    ALWAYS = "always"
    AUTO = "auto"


@dataclass(frozen=True, slots=True, kw_only=True)
class RouteConfig:
    """Costs in tokens of prefill work.

    `running_tokens` is what each running request slows a newcomer by; `amid_factor` is how much dearer a prompt token
    is on a decode worker, where it holds up streams, than on a prefill worker. Loading what is stored costs
    `load_tokens` and `load_factor` for each token, at first; then what requests have shown it to cost.
    """

    split: Split = Split.AUTO
    split_min_tokens: int = 64
    handover_tokens: int = 32
    load_tokens: float = 4.0
    load_factor: float = 0.05
    amid_factor: float = 1.5
    running_tokens: float = 16.0
    waiting_tokens: float = 128.0
    stale_s: float = 5.0
    stale_penalty_tokens: float = 4096.0
    sticky_tokens: float = 256.0

    def __post_init__(self) -> None:
        costs = (self.handover_tokens, self.running_tokens, self.waiting_tokens, self.stale_penalty_tokens)
        if (
            min(*costs, self.load_tokens, self.load_factor, self.split_min_tokens, self.sticky_tokens) < 0
            or self.stale_s <= 0
            or self.amid_factor < 1
        ):
            raise ValueError("routing costs must not be negative, amid_factor >= 1 and stale_s must be positive")


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A worker as routing sees it: how much of the prompt it has in its own cache, how much it could load."""

    worker: WorkerId
    cached_tokens: int = 0
    stored_tokens: int = 0
    running: int = 0
    waiting: int = 0
    queued_tokens: int = 0
    age_s: float = 0.0
    sticky: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Route:
    """The decision: decode there; prefill elsewhere unless `prefill` is None."""

    decode: WorkerId
    prefill: WorkerId | None = None


class Router:
    """Chooses by the expected work ahead of the request, in tokens: what is not cached, what is queued, what runs."""

    def __init__(self, config: RouteConfig) -> None:
        self._config = config
        self.kv = KvCost(fixed_tokens=config.load_tokens, factor=config.load_factor)

    def observe(self, took: Took) -> None:
        """Learn what prefilling and loading cost from a part of a request that has ended."""
        self.kv.observe(took)

    def cost(self, candidate: Candidate, prompt_tokens: int) -> float:
        """Expected work before this request's first token, were it prefilled at `candidate`."""
        return self.work(candidate, prompt_tokens) + self.load(candidate)

    def work(self, candidate: Candidate, prompt_tokens: int) -> float:
        """What is left to compute of the prompt at `candidate`, and to load where that costs less."""
        stored = min(candidate.stored_tokens, prompt_tokens) - candidate.cached_tokens
        return max(0, prompt_tokens - candidate.cached_tokens) - self.kv.saved_tokens(stored)

    def load(self, candidate: Candidate) -> float:
        """Work that others brought, and the penalty of a worker that was not heard of lately."""
        config = self._config
        return (
            candidate.queued_tokens
            + candidate.running * config.running_tokens
            + candidate.waiting * config.waiting_tokens
            + (config.stale_penalty_tokens if candidate.age_s > config.stale_s else 0.0)
            - (config.sticky_tokens if candidate.sticky else 0.0)
        )

    def best(self, candidates: Sequence[Candidate], prompt_tokens: int) -> Candidate:
        """The cheapest candidate; of equals the one that holds more of the prefix, then the first by name."""
        return min(candidates, key=lambda c: (self.cost(c, prompt_tokens), -c.cached_tokens, c.worker))

    def choose(self, *, prefill: Sequence[Candidate], decode: Sequence[Candidate], prompt_tokens: int) -> Route | None:
        """Place a request; None when nothing can decode it. A split that finds no prefill worker becomes none.

        With `auto` a request is split when much of its prompt must be computed, more than what loading it pays for,
        and the way over the prefill worker, hand-over and loading included, costs less than computing it amid the
        decode worker's own batch.
        """
        if not decode:
            return None
        alone = self.best(decode, prompt_tokens)
        if not prefill or self._config.split is Split.NEVER:
            return Route(decode=alone.worker)
        first = self.best(prefill, prompt_tokens)
        second = min(decode, key=lambda c: (self.load(c), -c.cached_tokens, c.worker))
        apart = Route(decode=second.worker, prefill=first.worker)
        if self._config.split is Split.ALWAYS:
            return apart
        computed = self.work(alone, prompt_tokens)
        if computed < max(self._config.split_min_tokens, self.kv.break_even_tokens):
            return Route(decode=alone.worker)
        cost_alone = computed * self._config.amid_factor + self.load(alone)
        moved = self._config.handover_tokens + self.kv.load_tokens(prompt_tokens - second.cached_tokens)
        cost_apart = self.cost(first, prompt_tokens) + moved + self.load(second)
        return apart if cost_apart <= cost_alone else Route(decode=alone.worker)


class PrefixMemory:
    """Where blocks of recent prompts went, as far as this gateway knows: bounded, least recently used forgotten.

    A worker's own KV events are surer; this also covers workers that publish none.
    """

    def __init__(self, capacity: int = 65_536) -> None:
        self._capacity = capacity
        self._holders: OrderedDict[bytes, WorkerId] = OrderedDict()

    def record(self, hashes: Sequence[bytes], worker: WorkerId) -> None:
        """`worker` now has these blocks."""
        for block in hashes:
            self._holders[block] = worker
            self._holders.move_to_end(block)
        while len(self._holders) > self._capacity:
            self._holders.popitem(last=False)

    def overlap(self, hashes: Sequence[bytes]) -> dict[WorkerId, int]:
        """How many leading blocks of a chain each worker was given last; only an unbroken run from the first counts."""
        found: dict[WorkerId, int] = {}
        for depth, block in enumerate(hashes):
            holder = self._holders.get(block)
            if holder is None:
                break
            found[holder] = depth + 1
        return found

    def forget(self, worker: WorkerId) -> None:
        """The worker is gone, and its blocks with it."""
        for block in [b for b, holder in self._holders.items() if holder == worker]:
            del self._holders[block]

    def check(self) -> None:
        """Invariants; raises AssertionError."""
        assert len(self._holders) <= self._capacity
