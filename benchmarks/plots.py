"""Plots as PNG files: where one would rather look than read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib as mpl

from benchmarks.load import Sample

mpl.use("Agg")

from matplotlib import pyplot as plt


def latency_plot(path: Path, by_case: Mapping[str, Sequence[Sample]]) -> None:
    """Cumulative distributions of TTFT, inter-token latency and E2E, a line for each case."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure, axes = plt.subplots(1, 3, figsize=(14, 4), layout="constrained")
    for case, samples in by_case.items():
        good = [s for s in samples if not s.error]
        series = ([s.ttft_s for s in good], [g for s in good for g in s.gaps_s], [s.e2e_s for s in good])
        for axis, values in zip(axes, series, strict=True):
            ordered = sorted(values)
            axis.step(ordered, [(i + 1) / len(ordered) for i in range(len(ordered))], where="post", label=case)
    for axis, title in zip(axes, ("time to first token", "inter-token latency", "end to end"), strict=True):
        axis.set(title=title, xlabel="seconds", ylabel="share of samples", ylim=(0, 1.02))
        axis.set_xlim(left=0)
        axis.grid(alpha=0.3)
        axis.legend()
    figure.savefig(path, dpi=110)
    plt.close(figure)
