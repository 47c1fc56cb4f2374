"""Learning a category's decision from labelled questions: the most right hits within a budget of wrong ones.

The labelled half is streamed through a cache of its own, as real traffic would be: each question is compared with those
kept so far and kept when it is not served. What is served depends on the decision that is being learnt, so streaming
and fitting alternate.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt

from covey.policy.evidence import FEATURES, Parsed, Rarity, evidence, parse
from covey.policy.reuse_model import DecisionModel, Flags, Floats, fit_weights

Vectors = npt.NDArray[np.float32]
Decide = Callable[[float, tuple[float, ...]], bool]

FIRST_TAU = 0.85
CANDIDATES = 48
BLOCK = 512
FOLDS = 2
Z_99 = 2.326
RELAXED_BUDGETS = 2.0
RIGHT_MIN = 5
"""With fewer right hits to be had in the labelled half, a category is not worth its look-ups."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LearningConfig:
    """`budget` is the share of all look-ups that may be false hits; the rest bounds the search for the decision."""

    budget: float = 0.01
    neighbours: int = 8
    floor: float = 0.6
    rounds: int = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Labelled:
    """One labelled question: equal `answer` means that one answer serves both; `shelf` parts what may never meet."""

    text: str
    answer: int
    vector: Vectors | None
    shelf: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Learnt:
    """What came out: `model` is None where nothing is worth serving. Counts are of the last stream over the half."""

    model: DecisionModel | None
    right: int
    false: int
    asked: int


@dataclass(slots=True)
class _Seen:
    """Evidence of each question that had a neighbour, and whether that one's answer was right."""

    features: Floats
    right: Flags
    served: Flags
    fold: npt.NDArray[np.int64]


class Replay:
    """One labelled half, parsed and compared once, to be streamed many times."""

    def __init__(self, questions: Sequence[Labelled], config: LearningConfig) -> None:
        self._questions = questions
        self._config = config
        self._parsed: list[Parsed] = [parse(question.text) for question in questions]
        self._answers = np.array([question.answer for question in questions])
        self._shelves = np.array([question.shelf for question in questions])
        dim = next((len(q.vector) for q in questions if q.vector is not None), 1)
        self._vectors = np.stack(
            [q.vector if q.vector is not None else np.zeros(dim, np.float32) for q in questions]
            or [np.zeros(dim, np.float32)]
        )
        self.rarity = Rarity()
        for parsed in self._parsed:
            self.rarity.add(parsed.stems)
        self._near = self._nearest_before()

    def __len__(self) -> int:
        return len(self._questions)

    def stream(self, decide: Decide, rarity: Rarity) -> _Seen:
        """Play the half through an empty cache that serves what `decide(similarity, evidence)` accepts."""
        kept = np.zeros(len(self), dtype=np.bool_)
        rows: list[tuple[float, ...]] = []
        right: list[bool] = []
        served: list[bool] = []
        fold: list[int] = []
        for index, question in enumerate(self._questions):
            if question.vector is None:
                continue
            found = self._neighbours(index, kept)
            hit = False
            if found and found[0][1] >= self._config.floor:
                answers = [int(self._answers[other]) for other, _ in found]
                features = evidence(
                    self._parsed[index],
                    self._parsed[found[0][0]],
                    [similarity for _, similarity in found],
                    [answer == answers[0] for answer in answers],
                    rarity,
                )
                hit = decide(found[0][1], features)
                rows.append(features)
                right.append(answers[0] == question.answer)
                served.append(hit)
                fold.append(index % FOLDS)
            kept[index] = not hit
        shape = np.array(rows, dtype=np.float64).reshape(len(rows), len(FEATURES))
        return _Seen(features=shape, right=np.array(right, bool), served=np.array(served, bool), fold=np.array(fold))

    def _neighbours(self, index: int, kept: npt.NDArray[np.bool_]) -> list[tuple[int, float]]:
        others, similarities = self._near[index]
        usable = kept[others]
        if usable.sum() < self._config.neighbours and len(others) == CANDIDATES:
            earlier = np.flatnonzero(kept[:index] & (self._shelves[:index] == self._shelves[index]))
            similarities = self._vectors[earlier] @ self._vectors[index]
            order = np.argsort(-similarities)[: self._config.neighbours]
            return [(int(earlier[at]), float(similarities[at])) for at in order]
        picked = np.flatnonzero(usable)[: self._config.neighbours]
        return [(int(others[at]), float(similarities[at])) for at in picked]

    def _nearest_before(self) -> list[tuple[npt.NDArray[np.int64], Vectors]]:
        near: list[tuple[npt.NDArray[np.int64], Vectors]] = []
        for start in range(0, len(self), BLOCK):
            block = self._vectors[start : start + BLOCK] @ self._vectors[: start + BLOCK].T
            for row, similarities in enumerate(block):
                index = start + row
                masked = np.where(self._shelves[:index] == self._shelves[index], similarities[:index], -2.0)
                count = min(CANDIDATES, index)
                top = np.argpartition(-masked, count - 1)[:count] if count else np.empty(0, np.int64)
                top = top[np.argsort(-masked[top])]
                top = top[masked[top] > -2.0] if count < CANDIDATES or (masked[top] <= -2.0).any() else top
                near.append((top, masked[top].astype(np.float32)))
        return near


def learn_decision(questions: Sequence[Labelled], config: LearningConfig = LearningConfig()) -> Learnt:
    """Learn the decision function of one category from its labelled half.

    The cut is chosen on scores of a model that was fitted on the other fold, with the margin of `false_hits_allowed`.
    """
    replay = Replay(questions, config)
    seen: list[_Seen] = []
    model: DecisionModel | None = None
    for _ in range(config.rounds):
        last = replay.stream(_decision(model), replay.rarity)
        seen.append(last)
        if not last.right.any() or last.right.all():
            return Learnt(model=None, right=0, false=0, asked=len(replay))
        model = _fit(seen, len(replay), replay.rarity, config)
        if model is None:
            return Learnt(model=None, right=0, false=0, asked=len(replay))
    final = replay.stream(_decision(model), replay.rarity)
    right, false = int((final.served & final.right).sum()), int((final.served & ~final.right).sum())
    return Learnt(model=model if right >= RIGHT_MIN else None, right=right, false=false, asked=len(replay))


def _is_over(tau: float, similarity: float, _: tuple[float, ...]) -> bool:
    return similarity >= tau


def learn_threshold(
    questions: Sequence[Labelled], taus: Sequence[float], config: LearningConfig
) -> tuple[float, int, int]:
    """Return the threshold with the most right hits within the budget, and its right and false hits (1, 0, 0: none)."""
    replay = Replay(questions, config)
    best = (1.0, 0, 0)
    for tau in sorted(taus):
        played = replay.stream(partial(_is_over, tau), replay.rarity)
        right, false = int((played.served & played.right).sum()), int((played.served & ~played.right).sum())
        if false <= false_hits_allowed(len(replay), config.budget) and right > best[1]:
            best = (tau, right, false)
    return best


def false_hits_allowed(asked: int, budget: float) -> int:
    """How many false hits may be seen so that as many questions again stay within the budget, at 99 % confidence.

    Both counts vary (Poisson), so k is allowed when k + z sqrt(2 k) is within the budget; a third of it always is.
    """
    limit = budget * asked
    allowed = int(limit)
    while allowed > limit / 3.0 and allowed + Z_99 * math.sqrt(2.0 * allowed) > limit:
        allowed -= 1
    return allowed


def _decision(model: DecisionModel | None) -> Decide:
    if model is None:
        return lambda similarity, _: similarity >= FIRST_TAU
    return lambda _, features: model.score(features) >= model.cut


def _fit(seen: Sequence[_Seen], asked: int, rarity: Rarity, config: LearningConfig) -> DecisionModel | None:
    features = np.concatenate([one.features for one in seen])
    right = np.concatenate([one.right for one in seen])
    fold = np.concatenate([one.fold for one in seen])
    last = seen[-1]
    scores = np.empty(len(last.right))
    for part in range(FOLDS):
        rest, here = fold != part, last.fold == part
        if not here.any():
            continue
        if not right[rest].any() or right[rest].all():
            return None
        intercept, weights = fit_weights(features[rest], right[rest])
        scores[here] = intercept + last.features[here] @ weights
    allowed = false_hits_allowed(asked, config.budget)
    cut = _cut(scores, last.right, allowed)
    if cut is None:
        return None
    relaxed = _cut(scores, last.right, int(RELAXED_BUDGETS * allowed))
    intercept, weights = fit_weights(features, right)
    return DecisionModel(
        weights=tuple(map(float, weights)),
        intercept=intercept,
        cut=cut,
        relaxed_cut=min(cut, relaxed if relaxed is not None else cut),
        floor=config.floor,
        typical=tuple(map(float, features[right].mean(axis=0))),
        rarity=rarity,
    )


def _cut(scores: Floats, right: Flags, allowed: int) -> float | None:
    """The least score at which no more than `allowed` are wrong; None when even the best one is too many."""
    order = np.argsort(-scores, kind="stable")
    wrong = np.cumsum(~right[order])
    inside = np.flatnonzero((wrong <= allowed) & right[order])
    if not len(inside):
        return None
    last = int(inside[-1])
    # Equal scores are served together: go back to where the whole group is within the allowance.
    while last >= 0 and (wrong[scores[order] >= scores[order[last]]] > allowed).any():
        last -= 1
    return float(scores[order[last]]) if last >= 0 else None
