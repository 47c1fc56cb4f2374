"""Which model answers: a contextual bandit over the models of a mesh, biased by their load (IC-Cache, section 4)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Features = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelChoiceConfig:
    """Bounds of the choice.

    `cost_weight` trades reward for cost; `load_bias`, `load_gain` and `load_threshold` are lambda0, gamma and L_thr of
    the paper's eq. 9. Under `close_std` among the arms' chances the answer of a second model is worth having: only then
    feedback is asked for. Ours: also where the two best are nearer to each other than either is known, or what is
    cheapest would answer for ever and nothing be learnt of the others. `prior` and `noise` are those of the Bayesian
    regression that stands for each arm.
    """

    cost_weight: float = 0.3
    load_bias: float = 1.0
    load_gain: float = 2.0
    load_threshold: float = 1.0
    load_smoothing: float = 0.2
    close_std: float = 0.1
    temperature: float = 0.25
    prior: float = 1.0
    noise: float = 0.25


@dataclass(frozen=True, slots=True, kw_only=True)
class Arm:
    """A model that could answer: its cost from 0 (free) to 1 (the dearest), and its queue wait over objective."""

    model: str
    cost: float
    load: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelDecision:
    """`second`, when set, is worth asking too. `chances` are those of the arms, in their order."""

    model: str
    second: str
    chances: tuple[float, ...]


class ModelChoice:
    """One linear model of the reward per arm, learnt from outcomes; ours where the paper trains a network in JAX."""

    def __init__(self, features: int, config: ModelChoiceConfig = ModelChoiceConfig(), *, arms_max: int = 16) -> None:
        self._size = features
        self._config = config
        self._arms_max = arms_max
        self._precision: dict[str, Features] = {}
        self._moment: dict[str, Features] = {}
        self._load: dict[str, float] = {}

    def choose(self, context: Features, arms: Sequence[Arm], rng: np.random.Generator) -> ModelDecision:
        """Take the arm with the best score; draw the second by Thompson sampling where the scores are close.

        Raises `ValueError` for no arms, or a context of another size.
        """
        if not arms or len(arms) > self._arms_max:
            raise ValueError(f"between 1 and {self._arms_max} arms are needed")
        if context.shape != (self._size,):
            raise ValueError(f"a context has {self._size} features")
        scores = [self._score(context, arm) for arm in arms]
        chances = _softmax(scores, self._config.temperature)
        best = max(range(len(arms)), key=lambda i: scores[i])
        second = ""
        is_close = float(np.std(chances)) < self._config.close_std or self._is_unsure(context, arms, scores)
        if len(arms) > 1 and is_close:
            rest = [i for i in range(len(arms)) if i != best]
            second = arms[max(rest, key=lambda i: self._drawn(context, arms[i], rng))].model
        return ModelDecision(model=arms[best].model, second=second, chances=tuple(chances))

    def observe(self, context: Features, model: str, reward: float) -> None:
        """Learn that `model` earned `reward` (0 to 1) in this context."""
        if model not in self._precision and len(self._precision) >= self._arms_max:
            return
        precision, moment = self._arm(model)
        self._precision[model] = precision + np.outer(context, context) / self._config.noise
        self._moment[model] = moment + context * (reward / self._config.noise)

    def reward(self, context: Features, model: str) -> float:
        """The reward expected of a model, before cost and load."""
        precision, moment = self._arm(model)
        return float(context @ np.linalg.solve(precision, moment))

    def check(self) -> None:
        """Assert the invariants that hold between any two calls."""
        assert self._precision.keys() == self._moment.keys()
        assert len(self._precision) <= self._arms_max
        for precision in self._precision.values():
            assert np.allclose(precision, precision.T)
            assert np.linalg.eigvalsh(precision).min() >= self._config.prior - 1e-6

    def _score(self, context: Features, arm: Arm) -> float:
        config = self._config
        known = self._load.pop(arm.model, arm.load)
        load = self._load[arm.model] = known + config.load_smoothing * (arm.load - known)
        while len(self._load) > self._arms_max:
            del self._load[next(iter(self._load))]
        bias = config.load_bias * math.tanh(config.load_gain * max(0.0, load - config.load_threshold)) * arm.cost
        return self.reward(context, arm.model) - config.cost_weight * arm.cost - bias

    def _is_unsure(self, context: Features, arms: Sequence[Arm], scores: Sequence[float]) -> bool:
        """Whether the two best scores differ by less than their standard error."""
        if len(arms) < 2:
            return False
        first, second = sorted(range(len(arms)), key=lambda i: -scores[i])[:2]
        spread = math.hypot(self._spread(context, arms[first].model), self._spread(context, arms[second].model))
        return scores[first] - scores[second] < spread

    def _drawn(self, context: Features, arm: Arm, rng: np.random.Generator) -> float:
        expected = self.reward(context, arm.model) - self._config.cost_weight * arm.cost
        return expected + self._spread(context, arm.model) * float(rng.normal())

    def _spread(self, context: Features, model: str) -> float:
        """The standard deviation of the expected reward."""
        precision, _ = self._arm(model)
        return math.sqrt(max(0.0, float(context @ np.linalg.solve(precision, context))))

    def _arm(self, model: str) -> tuple[Features, Features]:
        """An arm's books; one that never was observed expects a reward of nothing and is unsure of it."""
        if model in self._precision:
            return self._precision[model], self._moment[model]
        return self._config.prior * np.eye(self._size), np.zeros(self._size)


def _softmax(scores: Sequence[float], temperature: float) -> list[float]:
    top = max(scores)
    weights = [math.exp((score - top) / temperature) for score in scores]
    total = sum(weights)
    return [weight / total for weight in weights]
