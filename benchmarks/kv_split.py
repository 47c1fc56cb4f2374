"""`covey bench kv --break-even`: loading stored keys and values against prefilling again, by prompt length."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Literal

import anyio
import matplotlib as mpl
from rich.console import Console

from benchmarks.kv_break_even import LENGTHS, QUICK_LENGTHS, BreakEven, Point, break_even
from benchmarks.report import Report
from covey.clock import MonotonicClock
from covey.net.kv import KvClientConfig

mpl.use("Agg")

from matplotlib import pyplot as plt

TRANSPORTS: tuple[tuple[str, Literal["auto", "grpc"]], ...] = (("shm", "auto"), ("grpc", "grpc"))
ROUNDS, QUICK_ROUNDS = 7, 3


def run(run_dir: Path, cache_dir: Path, console: Console, *, quick: bool, plots: Path) -> Report:
    """Measure the packaged model over both transports, with a plot. Raises Unavailable without a store."""
    report, found = Report("kv_break_even"), {}
    for name, transport in TRANSPORTS:

        def show(point: Point, name: str = name) -> None:
            console.print(
                f"{name} {point.tokens} tokens: loaded by layer {1e3 * point.layers_s:.0f} ms, whole "
                f"{1e3 * point.whole_s:.0f} ms, prefilled {1e3 * point.prefill_s:.0f} ms"
            )

        measure = partial(
            break_even,
            MonotonicClock(),
            run_dir=run_dir / name,
            cache_dir=cache_dir,
            lengths=QUICK_LENGTHS if quick else LENGTHS,
            rounds=QUICK_ROUNDS if quick else ROUNDS,
            transport=KvClientConfig(transport=transport),
            on_point=show,
        )
        found[name] = anyio.run(measure)
        add_rows(report, name, found[name])
    plot(plots / "kv_break_even.png", found)
    return report


def add_rows(report: Report, name: str, found: BreakEven) -> None:
    """Add every point, and what they come to."""
    for point in found.points:
        case = f"{point.tokens}-{name}"
        times = {
            "load_layers_s": point.layers_s,
            "load_whole_s": point.whole_s,
            "prefill_s": point.prefill_s,
            "layers_wait_s": point.layers_wait_s,
            "whole_wait_s": point.whole_wait_s,
        }
        for metric, value in times.items():
            report.add(case=case, system="covey", metric=metric, unit="s", samples=[value])
        report.ratios[f"first_token_s/{case}/prefill"] = point.prefill_s / point.layers_s
        report.ratios[f"first_token_s/{case}/whole"] = point.whole_s / point.layers_s
    for metric, value in (
        ("break_even_tokens", found.tokens),
        ("load_tokens", found.fixed_tokens),
        ("load_factor", found.factor),
    ):
        report.add(case=name, system="covey", metric=metric, unit="tokens", samples=[value])


def plot(path: Path, found: dict[str, BreakEven]) -> None:
    """Time to the first decoded token by prompt length, a plot for each transport."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure, axes = plt.subplots(1, len(found), figsize=(6 * len(found), 4.5), layout="constrained", squeeze=False)
    for axis, (name, each) in zip(axes[0], found.items(), strict=True):
        tokens: Sequence[int] = [point.tokens for point in each.points]
        for label, values in (
            ("prefilled again", [point.prefill_s for point in each.points]),
            ("loaded whole", [point.whole_s for point in each.points]),
            ("loaded layer by layer", [point.layers_s for point in each.points]),
        ):
            axis.plot(tokens, values, marker="o", label=label)
        axis.axvline(each.tokens, linestyle="--", color="grey", label=f"loading pays from {each.tokens:.0f} tokens")
        axis.set(title=name, xlabel="prompt tokens", ylabel="seconds to the first token", xscale="log", yscale="log")
        axis.grid(alpha=0.3, which="both")
        axis.legend(fontsize="small")
    figure.savefig(path, dpi=110)
    plt.close(figure)
