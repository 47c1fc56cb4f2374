"""The plots of `covey bench cache`: right against false hits, and quality against cost, set by set."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib as mpl
import numpy as np
from numpy.typing import NDArray

from benchmarks.cache_figures import Figures
from benchmarks.drivers.questions import FALSE, RIGHT

mpl.use("Agg")

from matplotlib import pyplot as plt

FALSE_MAX = 5.0


def cache_plot(path: Path, figures: Figures, curves: Mapping[str, Sequence[tuple[float, float]]]) -> None:
    """One panel a set: the curve of all thresholds, and the systems as points; the dashed line is the budget."""
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = 3
    rows = -(-len(curves) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(13, 4 * rows), layout="constrained", squeeze=False)
    for axis in axes.flat[len(curves) :]:
        axis.set_axis_off()
    for axis, (name, curve) in zip(axes.flat, curves.items(), strict=False):
        axis.plot([f for f, _ in curve], [r for _, r in curve], color="0.6", label="one threshold, any")
        for system, played in figures.played.items():
            outcomes = played[name].outcomes
            at = (100.0 * float((outcomes == FALSE).mean()), 100.0 * float((outcomes == RIGHT).mean()))
            axis.plot(*at, "o", label=str(system))
        axis.axvline(1.0, color="0.8", linestyle="--")
        axis.set(title=name, xlabel="false hits per 100", ylabel="right hits per 100", xlim=(0, FALSE_MAX))
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
    axes.flat[0].legend(fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def share_plot(path: Path, curves: Mapping[str, Mapping[str, NDArray[np.float64]]], *, x: str, y: str) -> None:
    """One panel a set, one line a system, over shares from none to all; the dashed line is what all of it gives."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure, axes = plt.subplots(1, len(curves), figsize=(4.5 * len(curves), 4), layout="constrained", squeeze=False)
    for axis, (name, lines) in zip(axes.flat, curves.items(), strict=True):
        for system, line in lines.items():
            axis.plot(np.linspace(0.0, 1.0, len(line)), line, label=system)
            axis.axhline(line[-1], color="0.8", linestyle="--")
        axis.set(title=name, xlabel=x, ylabel=y)
        axis.grid(alpha=0.3)
    axes.flat[0].legend(fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)
