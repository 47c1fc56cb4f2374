"""The decision function of a category: a monotone logistic model over evidence, and how it is fitted."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from covey.policy.evidence import FEATURES, Parsed, Rarity, evidence

Floats = npt.NDArray[np.float64]
Flags = npt.NDArray[np.bool_]

NEWTON_STEPS = 40
SWEEPS = 200
RIDGE = 1.0
TOLERANCE = 1e-6


@dataclass(frozen=True, slots=True, kw_only=True)
class DecisionModel:
    """Serves where score = intercept + weights · evidence reaches `cut`; no weight is negative.

    So more similarity, agreement or shared words never turn a hit into a miss. `relaxed_cut` (at most `cut`) is what
    full load may lower the cut to; entries less similar than `floor` are not looked at. `typical` is the mean evidence
    of right hits: what a refusal is explained against.
    """

    weights: tuple[float, ...]
    intercept: float
    cut: float
    relaxed_cut: float
    floor: float
    typical: tuple[float, ...]
    rarity: Rarity

    def __post_init__(self) -> None:
        if not len(self.weights) == len(self.typical) == len(FEATURES):
            raise ValueError(f"a model has {len(FEATURES)} weights and typical values")
        if not all(0.0 <= weight < math.inf for weight in self.weights):
            raise ValueError("weights are finite and not negative")
        if not self.relaxed_cut <= self.cut:
            raise ValueError("relaxed_cut must not be over cut")
        if not all(map(math.isfinite, (self.intercept, self.cut, self.relaxed_cut, self.floor, *self.typical))):
            raise ValueError("a model's numbers are finite")

    def score(self, features: Sequence[float]) -> float:
        """The log odds of a right answer."""
        return self.intercept + sum(w * x for w, x in zip(self.weights, features, strict=True))

    def judge(
        self, asked: Parsed, stored: Parsed, similarities: Sequence[float], agrees: Sequence[bool]
    ) -> tuple[float, tuple[float, ...]]:
        """Return score and evidence of a candidate, the first of the neighbours."""
        features = evidence(asked, stored, similarities, agrees, self.rarity)
        return self.score(features), features

    def cut_at(self, degree: float) -> float:
        """The cut under a degree of relaxation between 0 and 1."""
        return self.cut - min(1.0, max(0.0, degree)) * (self.cut - self.relaxed_cut)

    def objection(self, features: Sequence[float]) -> str:
        """Name the feature that costs the most against a typical right hit."""
        costs = [w * (t - x) for w, t, x in zip(self.weights, self.typical, features, strict=True)]
        worst = max(range(len(costs)), key=costs.__getitem__)
        return (
            f"most against it: {FEATURES[worst]} {features[worst]:.2f} where right hits have {self.typical[worst]:.2f}"
        )

    def check(self) -> None:
        """Assert the invariants that a fit must keep."""
        assert all(weight >= 0 for weight in self.weights)
        assert self.relaxed_cut <= self.cut


def fit_weights(features: Floats, right: Flags, *, ridge: float = RIDGE) -> tuple[float, Floats]:
    """Fit intercept and non-negative weights by penalised logistic regression.

    Newton steps, each solved by coordinate descent under the bound, with halving where a step overshoots. Columns are
    scaled first, so that the penalty means the same for each.
    """
    mean, scale = features.mean(axis=0), features.std(axis=0)
    scale = np.where(scale > TOLERANCE, scale, np.inf)
    design = np.hstack([np.ones((len(features), 1)), (features - mean) / scale])
    penalty = np.r_[TOLERANCE, np.full(features.shape[1], ridge)]
    target = right.astype(np.float64)
    beta = np.zeros(design.shape[1])
    loss = _loss(design, target, beta, penalty)
    for _ in range(NEWTON_STEPS):
        chance = _sigmoid(design @ beta)
        gradient = design.T @ (chance - target) + penalty * beta
        weight = np.maximum(chance * (1.0 - chance), TOLERANCE)
        hessian = (design * weight[:, None]).T @ design + np.diag(penalty)
        step = _bounded_step(hessian, gradient, beta)
        while (new := _loss(design, target, beta + step, penalty)) > loss + TOLERANCE and np.abs(
            step
        ).max() > TOLERANCE:
            step /= 2.0
        beta = beta + step
        beta[1:] = np.maximum(beta[1:], 0.0)
        if loss - new < TOLERANCE * max(1.0, abs(loss)):
            break
        loss = new
    weights = beta[1:] / scale
    return float(beta[0] - weights @ mean), weights


def _bounded_step(hessian: Floats, gradient: Floats, beta: Floats) -> Floats:
    """Minimise the quadratic model over steps that keep all but the first coefficient non-negative."""
    step = np.zeros_like(beta)
    slope = gradient.copy()
    for _ in range(SWEEPS):
        moved = 0.0
        for index in range(len(beta)):
            wanted = step[index] - slope[index] / hessian[index, index]
            if index:
                wanted = max(wanted, -beta[index])
            change = wanted - step[index]
            if change:
                step[index] = wanted
                slope += change * hessian[:, index]
                moved = max(moved, abs(change))
        if moved < TOLERANCE:
            break
    return step


def _loss(design: Floats, target: Floats, beta: Floats, penalty: Floats) -> float:
    margin = design @ beta
    return float((np.logaddexp(0.0, margin) - target * margin).sum() + 0.5 * (penalty * beta * beta).sum())


def _sigmoid(x: Floats) -> Floats:
    return np.asarray(1.0 / (1.0 + np.exp(-np.clip(x, -60.0, 60.0))), dtype=np.float64)
