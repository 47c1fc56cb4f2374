"""Whether a cached answer may stand for a new request: per category a mode, a threshold, an age and a guard."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from types import MappingProxyType

from covey.errors import InvalidArgument
from covey.policy.reuse_guard import disagreement
from covey.types.program import CacheOutcome

GENERAL = "general"
"""The category of whatever is neither named nor classified."""


class ReuseMode(StrEnum):
    """What a category reuses: nothing, equal requests, or requests that mean the same."""

    OFF = "off"
    EXACT = "exact"
    SEMANTIC = "semantic"


@dataclass(frozen=True, slots=True, kw_only=True)
class CategoryPolicy:
    """How one class of traffic is cached (Category-Aware Semantic Caching; the numbers are ours).

    `tau` is the least cosine similarity of a semantic hit, `ttl_s` the absolute age limit (a hit never renews
    it), `quota_entries` the most entries of one (tenant, model) in this category. `guard` demands that numbers,
    quoted strings, negations and the order of arguments agree before a semantic hit is served.
    """

    name: str
    mode: ReuseMode = ReuseMode.EXACT
    tau: float = 0.92
    ttl_s: float = 86400.0
    quota_entries: int = 1000
    guard: bool = True

    def __post_init__(self) -> None:
        if not self.name or len(self.name) > 64:
            raise ValueError("a category's name has 1 to 64 characters")
        if not 0.0 < self.tau <= 1.0:
            raise ValueError(f"tau of category {self.name!r} must lie in (0, 1], is {self.tau}")
        if not self.ttl_s > 0:
            raise ValueError(f"ttl_s of category {self.name!r} must be over 0, is {self.ttl_s}")
        if self.quota_entries < 0:
            raise ValueError(f"quota_entries of category {self.name!r} must not be negative, is {self.quota_entries}")


DEFAULT_CATEGORIES = (
    CategoryPolicy(name=GENERAL),
    CategoryPolicy(name="code", tau=0.97, ttl_s=7 * 86400.0),
    CategoryPolicy(name="math", tau=0.97, ttl_s=30 * 86400.0),
    CategoryPolicy(name="faq", tau=0.92),
)
"""Every one exact: semantic reuse is for categories that a configuration switches on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A stored entry that might answer: its request's last user turn, and when it was stored (seconds)."""

    entry: str
    text: str
    stored_at: float
    similarity: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ReuseView:
    """All that a decision may depend on.

    `exact` is the entry of an equal request; `nearest` are entries of the same partition and context. `searched`
    names the tiers that could be asked: without any, the outcome is OFF and not a miss. `max_age_s` of 0 is no limit.
    """

    category: str
    text: str = ""
    max_age_s: float = 0.0
    exact: Candidate | None = None
    nearest: tuple[Candidate, ...] = ()
    searched_exact: bool = True
    searched_semantic: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class ReuseDecision:
    """What to do, and why; `entry` and `similarity` name the best candidate even when it is not served."""

    outcome: CacheOutcome
    why: str
    entry: str = ""
    similarity: float = 0.0

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
            stale = _too_old(policy, view, view.exact, now)
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
    best: ReuseDecision | None = None
    # A similarity that is no number has no place in an order.
    comparable = (candidate for candidate in view.nearest if not math.isnan(candidate.similarity))
    for candidate in sorted(comparable, key=lambda c: c.similarity, reverse=True):
        refusal = _refusal(policy, view, candidate, now)
        if not refusal:
            return _served(CacheOutcome.SEMANTIC, candidate, "a request that means the same was answered before")
        if best is None:
            best = ReuseDecision(
                outcome=CacheOutcome.MISS, why=refusal, entry=candidate.entry, similarity=candidate.similarity
            )
    return best or ReuseDecision(outcome=CacheOutcome.MISS, why="nothing is stored for this context")


def _refusal(policy: CategoryPolicy, view: ReuseView, candidate: Candidate, now: float) -> str:
    if not candidate.similarity >= policy.tau:  # so written that NaN never passes
        return f"similarity {candidate.similarity:.4f} is under the threshold {policy.tau:g}"
    if stale := _too_old(policy, view, candidate, now):
        return stale
    if policy.guard and (differs := disagreement(view.text, candidate.text)):
        return f"guard: {differs}"
    return ""


def _too_old(policy: CategoryPolicy, view: ReuseView, candidate: Candidate, now: float) -> str:
    age_s = now - candidate.stored_at
    if age_s >= policy.ttl_s:
        return f"the entry's time to live of {policy.ttl_s:g} s is over"
    if view.max_age_s and age_s > view.max_age_s:
        return f"the entry is older than the request's max_age_s of {view.max_age_s:g}"
    return ""


def _served(outcome: CacheOutcome, candidate: Candidate, why: str) -> ReuseDecision:
    return ReuseDecision(outcome=outcome, why=why, entry=candidate.entry, similarity=candidate.similarity)
