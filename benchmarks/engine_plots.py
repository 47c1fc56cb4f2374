"""The plot of `covey bench engine`: token rates beside each other, and how a step grows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import matplotlib as mpl

from benchmarks.engine_cases import DECODE, PREFILL
from benchmarks.engine_figures import Figures
from benchmarks.step_fit import Growth, Point

mpl.use("Agg")

from matplotlib import pyplot as plt


def engine_plot(path: Path, figures: Figures, points: Mapping[str, Sequence[Point]]) -> None:
    """Bars of prefill and decode, a group for each case, and the time of a step over its context."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure = plt.figure(figsize=(16, 12), layout="constrained")
    parts: Any = figure.subfigures(2, 1)
    above, below = parts
    rates = above.subplots(1, 2)
    _bars(rates[0], figures, PREFILL, "prefill")
    _bars(rates[1], figures, DECODE, "decode")
    steps = below.subplots(1, len(points), squeeze=False)[0]
    for axis, (precision, measured) in zip(steps, points.items(), strict=True):
        _steps(axis, precision, measured, *figures.growth[precision])
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _bars(axis: Any, figures: Figures, metric: str, title: str) -> None:
    cases = [case for case in figures.cases if case.metric == metric and not case.ours_only]
    series: dict[str, list[float]] = {
        f"{rates.contender.name} {rates.contender.precision}": [
            median(rates.rounds.get(case.name) or [0.0]) for case in cases
        ]
        for rates in figures.rates
    }
    for precision in figures.kv_bytes_per_token:
        products = [figures.products_tokens_per_s(case, precision) for case in cases]
        series[f"products {precision}"] = [median(found or [0.0]) for found in products]
        series[f"limit {precision}"] = [figures.limit_tokens_per_s(case, precision) or 0.0 for case in cases]
    width = 0.9 / len(series)
    for index, (name, values) in enumerate(series.items()):
        is_bound = name.startswith(("products", "limit"))
        places = [at + (index + 0.5) * width - 0.45 for at in range(len(cases))]
        axis.bar(places, values, width, label=name, alpha=0.4 if is_bound else 1.0, hatch="//" if is_bound else None)
    axis.set_xticks(range(len(cases)), [case.name for case in cases])
    # Rates of one stream and of 32, of a peer and of the limit, are far apart.
    axis.set(title=title, ylabel="tokens/s", yscale="log")
    axis.grid(alpha=0.3, axis="y")
    axis.legend(fontsize="small", ncols=2)


def _steps(axis: Any, precision: str, points: Sequence[Point], measured: Growth, due: Growth) -> None:
    for colour, rows in enumerate(sorted({point.rows for point in points})):
        mine = sorted((point for point in points if point.rows == rows), key=lambda point: point.context)
        contexts = [point.context for point in mine]
        shade = f"C{colour}"
        axis.plot(contexts, [point.seconds * 1e3 for point in mine], "o", color=shade, label=f"{rows} rows")
        axis.plot(contexts, [measured.seconds(rows, context) * 1e3 for context in contexts], "-", color=shade)
        axis.plot(contexts, [due.seconds(rows, context) * 1e3 for context in contexts], ":", color=shade)
    axis.set(
        title=f"a decode step, {precision} (line: fit, dots: arithmetic)",
        xlabel="tokens of context in each row",
        ylabel="milliseconds",
    )
    axis.set_ylim(bottom=0)
    axis.grid(alpha=0.3)
    axis.legend()
