"""The plot of `covey bench kv`: rates by block size, and look-ups."""

from __future__ import annotations

from pathlib import Path
from statistics import median

import matplotlib as mpl

from benchmarks.kv_cases import LOOKUPS, OPERATIONS, SIZES, TRANSPORTS, Load, loads
from benchmarks.kv_figures import Figures

mpl.use("Agg")

from matplotlib import pyplot as plt
from matplotlib.axes import Axes


def kv_plot(path: Path, figures: Figures) -> None:
    """Draw puts, gets and look-ups side by side."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure, axes = plt.subplots(1, 3, figsize=(15, 4.5), layout="constrained")
    for axis, operation in zip(axes, OPERATIONS, strict=False):
        _rates(axis, figures, operation)
    axis = axes[-1]
    for values, label in ((figures.lookups_s, "look-up"), (figures.empty_calls_s, "empty gRPC call")):
        axis.plot(range(len(LOOKUPS)), [1e3 * median(values[n]) for n in LOOKUPS], marker="o", label=label)
    axis.set(title="look-up of a stored prefix", xlabel="blocks", ylabel="milliseconds")
    axis.set_xticks(range(len(LOOKUPS)), [str(n) for n in LOOKUPS])
    axis.set_ylim(bottom=0)
    axis.grid(alpha=0.3)
    axis.legend()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _rates(axis: Axes, figures: Figures, operation: str) -> None:
    alone = [load for load in loads() if load.clients == 1]
    series: dict[str, list[float]] = {
        f"covey, {transport}": [_rate(figures.ours.get((operation, load, transport))) for load in alone]
        for transport in TRANSPORTS
    }
    for peer in sorted({peer for peer, _, _ in figures.theirs}):
        name = figures.versions.get(peer, peer) if peer == "valkey" else peer
        series[name] = [_rate(figures.theirs.get((peer, operation, load))) for load in alone]
    series["memcpy"] = [_memcpy(figures, load) for load in alone]
    for label, values in series.items():
        axis.plot(range(len(alone)), values, marker="o", label=label)
    axis.set(title=f"{operation}, one client", xlabel="block", ylabel="GB/s", yscale="log")
    axis.set_xticks(range(len(SIZES)), list(SIZES))
    axis.grid(alpha=0.3, which="both")
    axis.legend(fontsize="small")


def _rate(values: list[float] | None) -> float:
    return median(values) / 1e9 if values else float("nan")


def _memcpy(figures: Figures, load: Load) -> float:
    return _rate(figures.memcpy.get(load))
