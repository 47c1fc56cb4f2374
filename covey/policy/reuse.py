"""Whether a cached answer may stand for a new request: per category a mode, a threshold, an age and a guard."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from types import MappingProxyType

from covey.errors import InvalidArgument
from covey.policy.evidence import parse
from covey.policy.reuse_guard import ALL_CHECKS, Check, disagreement
from covey.policy.reuse_model import DecisionModel
from covey.types.program import CacheOutcome

GENERAL = "general"
"""The category of whatever is neither named nor classified."""


class ReuseMode(StrEnum):
    """What a category reuses: nothing, equal requests, or requests that mean the same."""

    OFF = "off"
    EXACT = "exact"
    SEMANTIC = "semantic"


class ReuseScope(StrEnum):
    """Whose answers may serve a request by meaning: those of the same model, or of any model of the tenant."""

    MODEL = "model"
    TENANT = "tenant"


@dataclass(frozen=True, slots=True, kw_only=True)
class CategoryPolicy:
    """How one class of traffic is cached (Category-Aware Semantic Caching; the numbers are ours).

    `tau` is the least cosine similarity of a semantic hit, `ttl_s` the absolute age limit (a hit never renews it),
    `quota_entries` and `quota_bytes` (0: no limit of its own) the most that one (tenant, model) keeps in this category.
    `guard` demands that the `checks` agree before a semantic hit is served. With a `model`, learnt from labelled
    questions, its score decides instead of `tau`. With a `delta` over 0, each entry earns its hits by verdicts so that
    at most that share of them is wrong (vCache).

    Under load of degree lambda the threshold is max(tau_min, tau - d_tau lambda), the age limit
    min(ttl_max_s, ttl_s (1 + beta lambda)), and a model's cut falls towards its relaxed one, as long as the estimated
    share of wrong hits is within `false_hits_max`. Without d_tau, beta or a model nothing is ever relaxed.
    """

    name: str
    mode: ReuseMode = ReuseMode.EXACT
    tau: float = 0.92
    tau_min: float = 0.0
    d_tau: float = 0.0
    ttl_s: float = 86400.0
    ttl_max_s: float = math.inf
    beta: float = 0.0
    quota_entries: int = 1000
    quota_bytes: int = 0
    guard: bool = True
    checks: frozenset[Check] = ALL_CHECKS
    scope: ReuseScope = ReuseScope.MODEL
    delta: float = 0.0
    false_hits_max: float = 0.03
    model: DecisionModel | None = None

    def __post_init__(self) -> None:
        self._check_bounds()
        if not self.name or len(self.name) > 64:
            raise ValueError("a category's name has 1 to 64 characters")
        if not 0.0 < self.tau <= 1.0:
            raise ValueError(f"tau of category {self.name!r} must lie in (0, 1], is {self.tau}")
        if not self.ttl_s > 0:
            raise ValueError(f"ttl_s of category {self.name!r} must be over 0, is {self.ttl_s}")
        if self.quota_entries < 0:
            raise ValueError(f"quota_entries of category {self.name!r} must not be negative, is {self.quota_entries}")

    def _check_bounds(self) -> None:
        for field in ("tau_min", "delta", "false_hits_max"):
            if not 0.0 <= getattr(self, field) < 1.0:
                raise ValueError(f"{field} of category {self.name!r} must lie in [0, 1), is {getattr(self, field)}")
        for field in ("d_tau", "beta", "quota_bytes"):
            if not 0.0 <= getattr(self, field) < math.inf:
                raise ValueError(f"{field} of category {self.name!r} must not be negative, is {getattr(self, field)}")
        if self.tau_min > self.tau:
            raise ValueError(f"tau_min of category {self.name!r} must not be over its tau of {self.tau}")
        if not self.ttl_max_s >= self.ttl_s:
            raise ValueError(f"ttl_max_s of category {self.name!r} must not be under its ttl_s of {self.ttl_s}")

    @property
    def least_similarity(self) -> float:
        """Entries below this are not worth a look, however high the load."""
        return self.model.floor if self.model is not None else self.tau_at(1.0)

    def tau_at(self, degree: float) -> float:
        """The threshold under a degree of relaxation."""
        return max(min(self.tau, self.tau_min), self.tau - self.d_tau * degree)

    def ttl_at(self, degree: float) -> float:
        """The age limit in seconds under a degree of relaxation."""
        return min(self.ttl_max_s, self.ttl_s * (1.0 + self.beta * degree))


DEFAULT_CATEGORIES = (
    CategoryPolicy(name=GENERAL),
    CategoryPolicy(name="code", tau=0.97, ttl_s=7 * 86400.0),
    CategoryPolicy(name="math", tau=0.97, ttl_s=30 * 86400.0),
    CategoryPolicy(name="faq", tau=0.92),
)
"""Every one exact: semantic reuse is for categories that a configuration switches on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A stored entry that might answer: its request's last user turn, and when it was stored (seconds).

    `answer` is equal for equal answers (0: unknown). `explore` is the probability with which its error bound wants the
    model asked. Neighbours that only vote need no `text`.
    """

    entry: str
    text: str
    stored_at: float
    similarity: float = 1.0
    answer: int = 0
    explore: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ReuseView:
    """All that a decision may depend on.

    `exact` is the entry of an equal request; `nearest` are entries of the same partition and context. `searched`
    names the tiers that could be asked: without any, the outcome is OFF and not a miss. `max_age_s` of 0 is no limit.
    `degree` is how far load relaxes the category, `draw` a random number in [0, 1) for entries with an error bound.
    """

    category: str
    text: str = ""
    max_age_s: float = 0.0
    exact: Candidate | None = None
    nearest: tuple[Candidate, ...] = ()
    searched_exact: bool = True
    searched_semantic: bool = False
    degree: float = 0.0
    draw: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ReuseDecision:
    """What to do, and why; `entry` and `similarity` name the best candidate even when it is not served.

    `relaxed`: only the load allowed this hit. `explored`: only the entry's error bound prevented it.
    """

    outcome: CacheOutcome
    why: str
    entry: str = ""
    similarity: float = 0.0
    relaxed: bool = False
    explored: bool = False

    @property
    def serves(self) -> bool:
        return self.outcome in (CacheOutcome.EXACT, CacheOutcome.SEMANTIC)


class ReusePolicy:
    """Chooses between serving an entry and asking the model, by the policies of a fixed set of categories."""

    def __init__(self, categories: Iterable[CategoryPolicy] = DEFAULT_CATEGORIES) -> None:
        self._categories = {category.name: category for category in categories}
        if GENERAL not in self._categories:
            raise ValueError(f"the category {GENERAL!r} must exist: unclassified requests fall into it")

    @property
    def categories(self) -> Mapping[str, CategoryPolicy]:
        """All categories by name."""
        return MappingProxyType(self._categories)

    def category(self, name: str) -> CategoryPolicy:
        """Return the policy of `name`, `general` for an empty one; raises `InvalidArgument` for an unknown one."""
        found = self._categories.get(name or GENERAL)
        if found is None:
            known = ", ".join(sorted(self._categories))
            raise InvalidArgument(f"unknown category; known are {known}", field="category")
        return found

    def choose(self, view: ReuseView, now: float) -> ReuseDecision:
        """Serve the equal request's answer, else the most similar one over threshold, age limit and guard."""
        policy = self.category(view.category)
        if policy.mode is ReuseMode.OFF:
            return ReuseDecision(outcome=CacheOutcome.OFF, why=f"category {policy.name} is off")
        if not (view.searched_exact or view.searched_semantic):
            return ReuseDecision(outcome=CacheOutcome.OFF, why="no tier applies to this request")
        stale = ""
        if view.exact is not None:
            stale = _too_old(policy, view, view.exact, now, 0.0)
            if not stale:
                return _served(CacheOutcome.EXACT, view.exact, "an equal request was answered before")
        if policy.mode is not ReuseMode.SEMANTIC or not view.searched_semantic:
            return ReuseDecision(outcome=CacheOutcome.MISS, why=stale or "no equal request is stored")
        return _nearest(policy, view, now)

    def check(self) -> None:
        """Assert the invariants of the table."""
        assert GENERAL in self._categories
        assert all(name == category.name for name, category in self._categories.items())


def _nearest(policy: CategoryPolicy, view: ReuseView, now: float) -> ReuseDecision:
    # A similarity that is no number has no place in an order.
    comparable = [candidate for candidate in view.nearest if not math.isnan(candidate.similarity)]
    ordered = sorted(comparable, key=lambda c: c.similarity, reverse=True)
    best: ReuseDecision | None = None
    for candidate in _eligible(policy, ordered):
        refusal = _refusal(policy, view, candidate, ordered, now, view.degree)
        if not refusal:
            if view.draw < candidate.explore:
                return _explored(candidate)
            strict = _refusal(policy, view, candidate, ordered, now, 0.0) if view.degree > 0.0 else ""
            why = f"allowed by load: {strict}" if strict else "a request that means the same was answered before"
            return _served(CacheOutcome.SEMANTIC, candidate, why, relaxed=bool(strict))
        if best is None:
            best = ReuseDecision(
                outcome=CacheOutcome.MISS, why=refusal, entry=candidate.entry, similarity=candidate.similarity
            )
    return best or ReuseDecision(outcome=CacheOutcome.MISS, why="nothing is stored for this context")


def _eligible(policy: CategoryPolicy, ordered: list[Candidate]) -> list[Candidate]:
    """A model weighs the nearest entry against all others; without one, each entry may answer for itself."""
    if policy.model is None:
        return ordered
    return [candidate for candidate in ordered if candidate.text][:1] or ordered[:1]


def _refusal(
    policy: CategoryPolicy, view: ReuseView, candidate: Candidate, ordered: list[Candidate], now: float, degree: float
) -> str:
    least = policy.model.floor if policy.model is not None else policy.tau_at(degree)
    if not candidate.similarity >= least:
        return f"similarity {candidate.similarity:.4f} is under the threshold {least:g}"
    if stale := _too_old(policy, view, candidate, now, degree):
        return stale
    if policy.guard and (differs := disagreement(view.text, candidate.text, policy.checks)):
        return f"guard: {differs}"
    if policy.model is not None:
        return _outweighed(policy.model, view, candidate, ordered, degree)
    return ""


def _outweighed(
    model: DecisionModel, view: ReuseView, candidate: Candidate, ordered: list[Candidate], degree: float
) -> str:
    others = [other for other in ordered if other is not candidate]
    agrees = [True, *(bool(other.answer) and other.answer == candidate.answer for other in others)]
    similarities = [candidate.similarity, *(other.similarity for other in others)]
    score, features = model.judge(parse(view.text), parse(candidate.text), similarities, agrees)
    cut = model.cut_at(degree)
    # So written that a score that is no number never passes.
    return "" if score >= cut else f"score {score:.2f} is under {cut:.2f}; {model.objection(features)}"


def _too_old(policy: CategoryPolicy, view: ReuseView, candidate: Candidate, now: float, degree: float) -> str:
    age_s, ttl_s = now - candidate.stored_at, policy.ttl_at(degree)
    if age_s >= ttl_s:
        return f"the entry's time to live of {ttl_s:g} s is over"
    if view.max_age_s and age_s > view.max_age_s:
        return f"the entry is older than the request's max_age_s of {view.max_age_s:g}"
    return ""


def _explored(candidate: Candidate) -> ReuseDecision:
    return ReuseDecision(
        outcome=CacheOutcome.MISS,
        why=f"the entry's error bound wants the model asked with probability {candidate.explore:.2f}",
        entry=candidate.entry,
        similarity=candidate.similarity,
        explored=True,
    )


def _served(outcome: CacheOutcome, candidate: Candidate, why: str, *, relaxed: bool = False) -> ReuseDecision:
    return ReuseDecision(
        outcome=outcome, why=why, entry=candidate.entry, similarity=candidate.similarity, relaxed=relaxed
    )
