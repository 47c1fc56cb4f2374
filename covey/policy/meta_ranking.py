"""Whether one answer can be trusted, by comparing it with reference answers to other questions (Meta Ranking)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

REFERENCES = 5
"""How many references the paper compares with (arXiv 2402.12146)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reference:
    """A pair of question and answer whose worth is known: `reliable` or not; `weight` is how much its vote counts."""

    id: str
    reliable: bool
    weight: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """What the judge said of the target against one reference.

    `first` with the target named first and `second` with the reference named first; each from the target's side: 1 the
    target is better, -1 worse, 0 neither. None: the judge was not asked in that order, or gave no verdict.
    """

    reference: Reference
    first: int | None
    second: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Judgement:
    """`score` in [-1, 1], from `votes` references that had a verdict; `reliable` is None when too few had one."""

    score: float
    votes: int
    reliable: bool | None


class MetaRanking:
    """Votes over comparisons: better than a good answer speaks for the target, worse than a bad one against it.

    The paper's weights could not be read. Ours: a comparison counts `w (s + c) / 2`, where `s` is +1 for a reliable
    reference and -1 for an unreliable one, and `c` the mean of both orders' verdicts, so that a judge who always
    prefers what stands first says nothing.
    """

    def __init__(self, *, theta: float = 0.0, votes_min: int = 3) -> None:
        """Scores over `theta` are reliable; under `votes_min` verdicts there is no judgement."""
        if not -1.0 <= theta <= 1.0 or votes_min < 1:
            raise ValueError("theta must lie in [-1, 1] and votes_min be at least 1")
        self._theta = theta
        self._votes_min = votes_min

    def judge(self, comparisons: Iterable[Comparison]) -> Judgement:
        """Weigh what the judge said."""
        total = weight = 0.0
        votes = 0
        for comparison in comparisons:
            verdict = _verdict(comparison)
            if verdict is None:
                continue
            worth = 1.0 if comparison.reference.reliable else -1.0
            total += comparison.reference.weight * (worth + verdict) / 2
            weight += comparison.reference.weight
            votes += 1
        score = total / weight if weight > 0 else 0.0
        return Judgement(score=score, votes=votes, reliable=score > self._theta if votes >= self._votes_min else None)

    def learn(self, scored: Sequence[tuple[float, bool]]) -> float:
        """Move `theta` to where scores best part reliable answers from others, and return it (balanced accuracy)."""
        good = sum(truth for _, truth in scored)
        bad = len(scored) - good
        if not good or not bad:
            return self._theta
        places = sorted({score for score, _ in scored})
        between = [-1.0, *((a + b) / 2 for a, b in pairwise(places))]

        def balanced(theta: float) -> float:
            kept = sum(truth for score, truth in scored if score > theta)
            dropped = sum(not truth for score, truth in scored if score <= theta)
            return kept / good + dropped / bad

        self._theta = max(between, key=lambda theta: (balanced(theta), -abs(theta)))
        return self._theta


def choose_references(similarities: Sequence[tuple[Reference, float]], count: int = REFERENCES) -> list[Reference]:
    """Take the references nearest to the target, reliable and unreliable ones in turn while both last.

    Ours: the paper draws them from a fixed set; votes mean most where both kinds are there.
    """
    ranked = [reference for reference, _ in sorted(similarities, key=lambda pair: (-pair[1], pair[0].id))]
    kinds = [[r for r in ranked if r.reliable], [r for r in ranked if not r.reliable]]
    chosen: list[Reference] = []
    while len(chosen) < count and any(kinds):
        kind = kinds[len(chosen) % 2] or kinds[(len(chosen) + 1) % 2]
        chosen.append(kind.pop(0))
    return chosen


def _verdict(comparison: Comparison) -> float | None:
    verdicts = [verdict for verdict in (comparison.first, comparison.second) if verdict is not None]
    return sum(verdicts) / len(verdicts) if verdicts else None
