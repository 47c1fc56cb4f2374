"""`covey bench serve`: a whole mesh under an open loop: TTFT, TPOT, ITL, E2E, goodput, start time and memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks.load import Sample, arrivals, open_loop
from benchmarks.memory import pss_bytes
from benchmarks.plots import latency_plot
from benchmarks.prompts import chat_prompts
from benchmarks.report import Report
from covey.cli.mesh import Mesh, MeshPlan, running
from covey.cli.state import http_client
from covey.cli.up import publish
from covey.clock import MonotonicClock
from covey.errors import CoveyError

SYSTEM = "covey"
RATES_PER_S = (0.25, 0.5, 1.0)
REQUESTS = 40
QUICK_RATES_PER_S = (0.5,)
QUICK_REQUESTS = 12
OUTPUT_TOKENS = 48
STATISTICS = ("mean", "p50", "p99")


@dataclass(frozen=True, slots=True, kw_only=True)
class Goal:
    """What makes a request good: the service-level objective that goodput counts by."""

    ttft_s: float = 2.0
    tpot_s: float = 0.2


async def run(
    plan: MeshPlan, console: Console, *, quick: bool, data: Path | None, plots: Path, goal: Goal | None = None
) -> Report:
    """Start a mesh, measure it idle, then at each rate; draw the plots.

    Raises:
        CoveyError: the mesh does not start, or an answer came from the cache though it was bypassed.
    """
    clock, report = MonotonicClock(), Report("serve")
    began = clock.now()
    async with running(plan) as mesh:
        report.add(case="start", system=SYSTEM, metric="ready_s", unit="s", samples=[clock.now() - began])
        _memory(mesh, report)
        prompts = chat_prompts(data)
        rates = QUICK_RATES_PER_S if quick else RATES_PER_S
        count = QUICK_REQUESTS if quick else REQUESTS
        by_rate: dict[str, list[Sample]] = {}
        async with http_client(publish(mesh)) as client:
            model = next(iter(plan.models))
            for rate in rates:
                bodies = [_body(model, prompts[i % len(prompts)]) for i in range(count)]
                samples = await _measure(client, bodies, rate, console)
                _check(samples)
                by_rate[f"{rate:g}rps"] = samples
                _rows(report, f"{rate:g}rps", samples, goal or Goal())
    latency_plot(plots / "serve.png", by_rate)
    return report


async def _measure(
    client: httpx.AsyncClient, bodies: Sequence[dict[str, Any]], rate: float, console: Console
) -> list[Sample]:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(f"{rate:g} requests/s", total=len(bodies))
        times = arrivals(rate, len(bodies), seed=1)
        return await open_loop(client, bodies, times, MonotonicClock(), lambda _sample: progress.advance(task))


def _body(model: str, prompt: str) -> dict[str, Any]:
    return {
        "model": model,
        "messages": [{"role": "user", "content": prompt}],
        "max_tokens": OUTPUT_TOKENS,
        "temperature": 0,
        "cache": "bypass",
    }


def _check(samples: Sequence[Sample]) -> None:
    for sample in samples:
        if not sample.error and sample.meta.get("cache") != "bypass":
            raise CoveyError(f"an answer was not computed: cache outcome {sample.meta.get('cache')!r}")


def _rows(report: Report, case: str, samples: Sequence[Sample], goal: Goal) -> None:
    good = [s for s in samples if not s.error]
    series = {
        "ttft_s": [s.ttft_s for s in good],
        "tpot_s": [s.tpot_s for s in good if s.output_tokens > 1],
        "itl_s": [gap for s in good for gap in s.gaps_s],
        "e2e_s": [s.e2e_s for s in good],
    }
    for metric, values in series.items():
        for at in STATISTICS:
            report.add(case=case, system=SYSTEM, metric=metric, unit="s", samples=values, at=at)
    met = [float(not s.error and s.ttft_s <= goal.ttft_s and s.tpot_s <= goal.tpot_s) for s in samples]
    report.add(case=case, system=SYSTEM, metric="goodput", unit="share", samples=met)
    span = max(s.ended for s in samples) - min(s.started for s in samples)
    tokens = sum(s.output_tokens for s in good) / span
    report.add(case=case, system=SYSTEM, metric="output_tokens_per_s", unit="tokens/s", samples=[tokens])
    report.add(case=case, system=SYSTEM, metric="failed", unit="requests", samples=[len(samples) - len(good)])


def _memory(mesh: Mesh, report: Report) -> None:
    sizes = {name: pss_bytes(child.pid) / 2**20 for name, child in mesh.children.items()}
    sizes["nats"] = pss_bytes(mesh.nats.pid) / 2**20
    for name, size in sizes.items():
        report.add(case="idle", system=SYSTEM, metric=f"pss_{name}", unit="MiB", samples=[size])
    report.add(case="idle", system=SYSTEM, metric="pss_total", unit="MiB", samples=[sum(sizes.values())])
