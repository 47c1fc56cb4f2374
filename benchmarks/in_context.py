"""The choice between a small and a large model on recorded pairs: quality against cost, beside simpler rules."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from random import Random

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import Progress

from benchmarks.cache_plots import share_plot
from benchmarks.cache_vectors import VectorFile
from benchmarks.recorded_pairs import Pair, PairSet, alpaca_eval, arena_hard, gsm8k, texts_to_compare
from benchmarks.report import Report, Row
from covey.policy.model_choice import Arm, ModelChoice, ModelChoiceConfig
from covey.policy.request_features import FEATURES, Outcome, request_features
from services.semcache.vectors import Vectors

NEIGHBOURS = 20
RESAMPLES = 500
POINTS = 101
QUICK_PAIRS = 250
SPLITS = 5
NEARLY = 0.98
"""Quality that counts as the large model's own, beside exactly that."""
METRICS = {"area": "", "offload_at_equal": "share", "offload_at_98": "share"}

Curve = NDArray[np.float64]
VectorOf = Callable[[str], Vectors | None]


def measure(report: Report, data: Path, vectors: VectorFile, console: Console, *, quick: bool, plot: Path) -> None:
    """Add the rows and ratios of every set of recorded pairs, and draw their curves.

    A split learns from one half as the service would (each request shows only what the chosen model earned, and the
    second one's where the bandit asks for it) and is measured on the other; `SPLITS` such splits, pairs resampled.
    """
    count = QUICK_PAIRS if quick else None
    with Progress(console=console) as progress:
        texts = [*texts_to_compare(data, count=count), *(pair.text for pair in gsm8k(data).pairs[:count])]
        vectors.fill(texts, progress)
    problems = gsm8k(data)
    problems = replace(problems, pairs=problems.pairs[:count])
    others = (read(data, vectors.vector, count=count) for read in (alpaca_eval, arena_hard))
    curves: dict[str, dict[str, Curve]] = {}
    for pairs in (problems, *others):
        console.print(f"{pairs.name}: {len(pairs.pairs)} pairs; quality: {pairs.quality}", markup=False)
        curves[pairs.name] = _measure_set(report, pairs, vectors.vector, splits=2 if quick else SPLITS)
    share_plot(plot, curves, x="share sent to the large model", y="mean quality")


def _measure_set(report: Report, pairs: PairSet, vector_of: VectorOf, *, splits: int) -> dict[str, Curve]:
    """Add a set's rows and ratios; returns each system's mean curve at `POINTS` even shares."""
    for always in ("small", "large"):
        qualities = [getattr(pair, always) for pair in pairs.pairs]
        report.add(case=pairs.name, system=f"always {always}", metric="quality", unit="", samples=qualities)
    drawn: dict[str, list[Curve]] = {}
    found: dict[str, dict[str, list[float]]] = {}
    for split in range(splits):
        held = _held_out(pairs.pairs, vector_of, Random(split))  # noqa: S311 - reproducible splits
        rng = np.random.default_rng(split)
        for system, order in held.orders.items():
            curve = _curve(held.small, held.large, order)
            even = np.interp(np.linspace(0, 1, POINTS), np.linspace(0, 1, len(curve)), curve)
            drawn.setdefault(system, []).append(even)
        for _ in range(RESAMPLES // splits):
            at = rng.integers(0, len(held.small), len(held.small))
            for system, order in held.orders.items():
                curve = _curve(held.small[at], held.large[at], order[at])
                for metric, value in _summary(curve).items():
                    found.setdefault(system, {}).setdefault(metric, []).append(value)
    for system, metrics in found.items():
        for metric, samples in metrics.items():
            value, (low, high) = float(np.mean(samples)), np.percentile(samples, [2.5, 97.5])
            report.rows.append(
                Row(
                    case=pairs.name,
                    system=system,
                    metric=metric,
                    unit=METRICS[metric],
                    value=value,
                    lo=float(low),
                    hi=float(high),
                    n=len(pairs.pairs),
                )
            )
    for system in ("random", "similarity"):
        report.ratios[f"area/{pairs.name}/{system}"] = float(
            np.mean(found["covey"]["area"]) / np.mean(found[system]["area"])
        )
    return {system: np.mean(some, axis=0) for system, some in drawn.items()}


class _HeldOut:
    """The measured half: qualities of both models, and by system how much each request wants the large one."""

    def __init__(self, pairs: Sequence[Pair]) -> None:
        self.small = np.array([pair.small for pair in pairs])
        self.large = np.array([pair.large for pair in pairs])
        self.orders: dict[str, NDArray[np.float64]] = {}


def _held_out(pairs: Sequence[Pair], vector_of: VectorOf, rng: Random) -> _HeldOut:
    usable = [pair for pair in pairs if vector_of(pair.text) is not None]
    rng.shuffle(usable)
    half = len(usable) // 2
    learnt = _Memory(vector_of)
    choice = ModelChoice(FEATURES, ModelChoiceConfig())
    draws = np.random.default_rng(rng.getrandbits(64))
    arms = (Arm(model="small", cost=0.1), Arm(model="large", cost=1.0))
    for pair in usable[:half]:
        features = learnt.features(pair.text)
        decision = choice.choose(features, arms, draws)
        earned = {name: getattr(pair, name) for name in {decision.model, decision.second} - {""}}
        for model, reward in earned.items():
            choice.observe(features, model, reward)
        learnt.add(pair.text, earned)
    rest = usable[half:]
    held = _HeldOut(rest)
    contexts = [learnt.features(pair.text) for pair in rest]
    held.orders = {
        "covey": np.array([choice.reward(x, "large") - choice.reward(x, "small") for x in contexts]),
        "similarity": np.array([-x[4] for x in contexts]),
        "random": np.array([rng.random() for _ in rest]),
    }
    return held


class _Memory:
    """What is known of earlier requests: their vectors, and what the models that were asked earned."""

    def __init__(self, vector_of: VectorOf) -> None:
        self._vector_of = vector_of
        self._vectors: list[Vectors] = []
        self._earned: list[dict[str, float]] = []

    def add(self, text: str, earned: dict[str, float]) -> None:
        vector = self._vector_of(text)
        assert vector is not None
        self._vectors.append(vector)
        self._earned.append(earned)

    def features(self, text: str) -> NDArray[np.float64]:
        vector = self._vector_of(text)
        if not self._vectors or vector is None:
            return request_features(text, [])
        similarities = np.stack(self._vectors) @ vector
        nearest = np.argsort(-similarities)[:NEIGHBOURS]
        outcomes = [
            Outcome(
                similarity=float(similarities[i]), cheap=self._earned[i].get("small"), dear=self._earned[i].get("large")
            )
            for i in nearest
        ]
        return request_features(text, outcomes)


def _curve(small: Curve, large: Curve, wants_large: Curve) -> Curve:
    """Mean quality when the `i` requests that want it most go to the large model, for every `i`."""
    order = np.argsort(-wants_large, kind="stable")
    gains = np.concatenate(([0.0], np.cumsum((large - small)[order])))
    quality: Curve = (small.sum() + gains) / len(small)
    return quality


def _summary(curve: Curve) -> dict[str, float]:
    """Area under quality over the share sent to the large model, and how much can stay small at its quality."""
    always_large = curve[-1]
    shares = np.linspace(0.0, 1.0, len(curve))

    def offload(quality: float) -> float:
        return float(1.0 - shares[np.flatnonzero(curve >= quality - 1e-12)[0]])

    area = float(np.trapezoid(curve, shares))
    return {"area": area, "offload_at_equal": offload(always_large), "offload_at_98": offload(NEARLY * always_large)}
