"""`covey bench serve`: a whole mesh, and its peers in turn, under one open loop of chat requests."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import anyio
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks.export import export
from benchmarks.figures import ALONE, Goal, Measured, add_ratios, add_rows, output_tokens_per_s
from benchmarks.limit import Limits, measure
from benchmarks.load import Sample, arrivals, one_by_one, open_loop
from benchmarks.neighbours import cpu_time, is_disturbed, others_cores
from benchmarks.peers import python_of, read_state
from benchmarks.plots import latency_plot
from benchmarks.prompts import chat_prompts
from benchmarks.report import Report
from benchmarks.system import Covey, Serving, System
from benchmarks.vllm_server import Vllm
from benchmarks.workload import Workload, workload
from covey.cli.mesh import MeshPlan
from covey.clock import Clock, MonotonicClock
from covey.errors import CoveyError
from covey.model.config import ModelConfig
from covey.model.source import ModelSource, resolve

OURS = "covey"
WARM_UP = "Name three rivers."
OUTPUT_TOKENS = 48
BURST = 8

AnySystem = TypeVar("AnySystem", bound=System)


async def run(plan: MeshPlan, console: Console, *, quick: bool, peers: bool, data: Path | None, plots: Path) -> Report:
    """Measure the machine, the mesh and, if asked, its peers; draw the plots.

    Raises:
        CoveyError: the mesh does not start, or an answer came from the cache though it was bypassed.
    """
    clock, report = MonotonicClock(), Report("serve")
    model, given = next(iter(plan.models.items()))
    source = await anyio.to_thread.run_sync(resolve, given)
    bench = ServeBench(
        model=model,
        prompts=chat_prompts(data),
        workload=workload(quick=quick, peers=peers),
        console=console,
        clock=clock,
    )
    limits = await anyio.to_thread.run_sync(measure, clock)
    vllm = await best_vllm(bench, plan, source, quick=quick) if peers else None
    await bench.run(Covey(plan=plan, clock=clock), [vllm] if vllm else [])
    bench.write(report)
    if vllm and vllm.name in bench.results:
        compiled = [float(vllm.mode == "compiled")]
        report.add(case="setting", system=vllm.name, metric="compiled", unit="(1: yes)", samples=compiled)
    add_limit(report, limits, await anyio.to_thread.run_sync(source.config))
    bench.plot(plots / "serve.png")
    return report


def add_limit(report: Report, limits: Limits, config: ModelConfig) -> None:
    """Add what the machine can do, and Covey's share of it where one request decodes alone.

    An open loop gives no such ratio: below saturation its throughput is what was asked for, and at a batch above 1
    the weights are read once for several tokens.
    """
    reads, operations = [limits.read_bytes_per_s / 1e9], [limits.operations_per_s["fp32"] / 1e9]
    report.add(case="machine", system="limit", metric="read_gb_per_s", unit="GB/s", samples=reads)
    report.add(case="machine", system="limit", metric="product_gflop_per_s", unit="GFLOP/s", samples=operations)
    best = limits.decode_tokens_per_s(config)
    metric = "decode_tokens_per_s"
    report.add(case=ALONE, system="limit", metric=metric, unit="tokens/s", samples=[best])
    ours = report.value(case=ALONE, system=OURS, metric=metric)
    if ours is not None:
        report.ratios[f"{metric}/{ALONE}/limit"] = ours / best


async def best_vllm(bench: ServeBench, plan: MeshPlan, source: ModelSource, *, quick: bool) -> Vllm | None:
    """The peer in its best setting (eager if it must be `quick`); if it does not work, the reason on the console."""
    state = read_state("vllm")
    if not state.ok:
        bench.leave_out("vllm", state.reason)
        return None
    log, model = plan.files.run_dir / "vllm.log", next(iter(plan.models))
    try:
        folder = await anyio.to_thread.run_sync(export, source, plan.files.cache_dir)
        eager = Vllm(python=python_of("vllm"), folder=folder, model=model, log=log, clock=MonotonicClock())
        return eager if quick else await bench.fastest([eager, replace(eager, mode="compiled")])
    except CoveyError as error:
        bench.leave_out("vllm", str(error))
        return None


class ServeBench:
    """Measures systems in turn, never two at a time; all get the same prompts at the same times.

    `model` is what requests name. `results` holds the samples by system.
    """

    def __init__(
        self, *, model: str, prompts: Sequence[str], workload: Workload, console: Console, clock: Clock
    ) -> None:
        self.results: dict[str, Measured] = {}
        self._model, self._prompts, self._workload = model, prompts, workload
        self._console, self._clock = console, clock

    async def run(self, ours: System, peers: Sequence[System]) -> None:
        """Measure every system in every round; a peer that fails is left out from there on, and the reason printed.

        Raises:
            CoveyError: the mesh does not start, or an answer came from the cache though it was bypassed.
        """
        left = list(peers)
        for round_index in range(self._workload.rounds):
            await self._measure(ours, round_index)
            for peer in tuple(left):
                try:
                    await self._measure(peer, round_index)
                except CoveyError as error:
                    self.leave_out(peer.name, str(error))
                    self.results.pop(peer.name, None)
                    left.remove(peer)

    def leave_out(self, peer: str, reason: str) -> None:
        """Say why a peer is not in the report."""
        self._console.print(f"{peer} is left out: {reason}", markup=False)

    def write(self, report: Report, goal: Goal | None = None) -> None:
        """Add every system's rows, and how each peer compares."""
        for name, measured in self.results.items():
            add_rows(report, name, measured, goal or Goal())
        for name in self.results:
            if name != OURS:
                add_ratios(report, name, self.results[OURS], self.results[name])

    def plot(self, path: Path) -> None:
        """Draw the latencies of every system at every rate."""
        by_case = {
            f"{name} {case}": [sample for samples in rounds for sample in samples]
            for name, measured in self.results.items()
            for case, rounds in measured.cases.items()
            if case != ALONE
        }
        latency_plot(path, by_case)

    async def _measure(self, system: System, round_index: int) -> None:
        self._console.print(f"starting {system.name}", style="dim")
        async with system.serving() as serving:
            measured = self.results.setdefault(system.name, Measured())
            measured.add_start(serving.ready_s, serving.memory_bytes())
            await one_by_one(serving.client, [self._body(system, WARM_UP)], self._clock, lambda _: None)
            before = cpu_time(serving.pids.values(), self._clock)
            alone = self._bodies(system, 0, self._workload.alone)
            measured.add(ALONE, await self._loop(serving, system, "one at a time", alone))
            for i, rate in enumerate(self._workload.rates_per_s):
                # Each loop starts with prompts that the one before it has not asked, as long as there are more.
                bodies = self._bodies(
                    system, self._workload.alone + i * self._workload.requests, self._workload.requests
                )
                times = arrivals(rate, len(bodies), seed=1 + round_index)
                samples = await self._loop(serving, system, f"{rate:g} requests/s", bodies, times)
                measured.add(f"{rate:g}rps", samples)
            others = others_cores(before, cpu_time(serving.pids.values(), self._clock))
        measured.others_cores.append(others)
        if is_disturbed(others):
            self._console.print(
                f"disturbed: others used {others:.2f} cores while {system.name} was measured", style="yellow"
            )

    async def fastest(self, settings: Sequence[AnySystem]) -> AnySystem:
        """Whichever setting of one peer gives the most tokens a second to requests that come all at once.

        Raises:
            CoveyError: none of them works.
        """
        rates: dict[int, float] = {}
        failure = CoveyError("there is no setting to choose from")
        for i, system in enumerate(settings):
            try:
                rates[i] = await self._burst_tokens_per_s(system)
            except CoveyError as error:
                self._console.print(f"a setting of {system.name} does not work: {error}", markup=False)
                failure = error
        if not rates:
            raise failure
        return settings[max(rates, key=rates.__getitem__)]

    async def _burst_tokens_per_s(self, system: System) -> float:
        async with system.serving() as serving:
            await one_by_one(serving.client, [self._body(system, WARM_UP)], self._clock, lambda _: None)
            bodies = self._bodies(system, 0, BURST)
            return output_tokens_per_s(await self._loop(serving, system, "a burst", bodies, [0.0] * BURST))

    async def _loop(
        self,
        serving: Serving,
        system: System,
        what: str,
        bodies: Sequence[dict[str, Any]],
        times: Sequence[float] | None = None,
    ) -> list[Sample]:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        with Progress(*columns, console=self._console) as progress:
            task = progress.add_task(f"{system.name}: {what}", total=len(bodies))

            def tick(_: Sample) -> None:
                progress.advance(task)

            if times is None:
                samples = await one_by_one(serving.client, bodies, self._clock, tick)
            else:
                samples = await open_loop(serving.client, bodies, times, self._clock, tick)
        check_answers(system, samples)
        return samples

    def _bodies(self, system: System, first: int, count: int) -> list[dict[str, Any]]:
        return [self._body(system, self._prompts[i % len(self._prompts)]) for i in range(first, first + count)]

    def _body(self, system: System, prompt: str) -> dict[str, Any]:
        return {
            "model": self._model,
            "messages": [{"role": "user", "content": prompt}],
            "max_tokens": OUTPUT_TOKENS,
            "temperature": 0,
            **system.extra,
        }


def check_answers(system: System, samples: Sequence[Sample]) -> None:
    """Every answer was computed.

    Raises:
        CoveyError: one came from a cache that the request said to bypass, or none came at all.
    """
    wanted = system.extra.get("cache")
    for sample in samples:
        if not sample.error and sample.meta.get("cache") != wanted:
            raise CoveyError(f"an answer was not computed: cache outcome {sample.meta.get('cache')!r}")
    if all(sample.error for sample in samples):
        raise CoveyError(f"{system.name} answered no request: {samples[0].error}")
