"""`covey bench engine`: our runner, its peers and the bare machine in turn, on the same weights and prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks.child import Child
from benchmarks.contenders import Contender, machine, ours, peers
from benchmarks.engine_cases import Case, cases
from benchmarks.engine_figures import Figures, Rates, products_rows
from benchmarks.engine_plots import engine_plot
from benchmarks.engine_text import text_tokens
from benchmarks.isa import held_to
from benchmarks.limit import Limits
from benchmarks.neighbours import cpu_time, is_disturbed, others_cores
from benchmarks.report import Report
from benchmarks.step_fit import GRID, QUICK_GRID, Point, arithmetic, fit
from covey.clock import Clock, MonotonicClock
from covey.errors import CoveyError, Unavailable
from covey.model.source import ModelSource, resolve

PRECISIONS = ("fp32", "int8", "bf16")
QUICK_PRECISIONS = ("fp32", "int8")
ROUNDS, STEPS = 3, 64
QUICK_ROUNDS, QUICK_STEPS = 1, 16
GRID_STEPS = 7
ASK_LIMIT_S = 300.0
PRODUCTS_LIMIT_S = 600.0
REFRESH_PER_S = 1.0
"""Drawing progress more often would take part of a core from what is measured."""

WARM_UP_STEPS = 2
QUICK_WARM_UP = ("128",)


def run(
    model: str, cache_dir: Path, run_dir: Path, console: Console, *, quick: bool, with_peers: bool, data: Path | None,
    plots: Path, isa: str | None = None,
) -> Report:  # fmt: skip
    """Measure everything in turn and draw the plot; a peer that fails is left out, and the reason printed.

    `isa` holds all systems to an instruction set (see `benchmarks.isa`).

    Raises:
        CoveyError: our own fp32 runner, or the machine's own measurement, fails.
    """
    source, report = resolve(model), Report(f"engine-{isa}" if isa else "engine")
    found = [ours(model, cache_dir, precision) for precision in (QUICK_PRECISIONS if quick else PRECISIONS)]
    bench = EngineBench(source, run_dir, console, MonotonicClock(), steps=QUICK_STEPS if quick else STEPS)
    if with_peers:
        theirs, missing = peers(source, cache_dir, quick=quick)
        for name, reason in missing.items():
            bench.leave_out(name, reason)
        found += theirs
    with bench:
        held = held_to(isa) if isa else {}
        bench.start([replace(each, environment={**each.environment, **held}) for each in (machine(model), *found)])
        bench.measure(text_tokens(source, data), QUICK_ROUNDS if quick else ROUNDS)
        points = bench.grid(QUICK_GRID if quick else GRID)
    figures = bench.figures()
    for precision, measured in points.items():
        due = arithmetic(figures.config, figures.limits, precision, figures.kv_bytes_per_token[precision])
        figures.growth[precision] = (fit(measured), due)
    figures.write(report)
    report.add(case="machine", system="others", metric="others_cores", unit="cores", samples=bench.others_cores)
    for doubt in figures.doubts():
        console.print(doubt, style="yellow", markup=False)
    engine_plot(plots / "engine.png", figures, points)
    return report


class EngineBench:
    """All systems started and standing still but the one that is asked. A context manager: leaving it ends them."""

    def __init__(self, source: ModelSource, run_dir: Path, console: Console, clock: Clock, *, steps: int) -> None:
        self.others_cores: list[float] = []
        self._config, self._run_dir, self._console, self._clock = source.config(), run_dir, console, clock
        self._steps = steps
        self._stack = ExitStack()
        self._machine: Child | None = None
        self._children: list[tuple[Child, Rates]] = []
        self._cases: tuple[Case, ...] = ()
        self._limits: list[Limits] = []
        self._products_s: dict[tuple[str, int, int], list[float]] = {}
        self._kv_bytes: dict[str, float] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def leave_out(self, name: str, reason: str) -> None:
        """Say why a system is not in the report."""
        self._console.print(f"{name} is left out: {reason}", markup=False)

    def start(self, contenders: Sequence[Contender]) -> None:
        """Start the machine's driver, which comes first, and every system; one at a time, for each takes all cores."""
        for contender in contenders:
            name = f"{contender.name}-{contender.precision}".rstrip("-")
            with self._console.status(f"starting {name}"):
                try:
                    child, version = self._started(contender, name)
                except CoveyError as error:
                    if not contender.peer and contender.precision in ("", "fp32"):
                        raise
                    self.leave_out(name, str(error))
                    continue
            if not contender.precision:
                self._machine = child
                continue
            self._children.append((child, Rates(contender=contender, version=version)))
            if contender.is_ours:
                self._kv_bytes[contender.precision] = child.ask("kv_bytes_per_token", ASK_LIMIT_S)

    def measure(self, text: Sequence[int], rounds: int) -> None:
        """Ask every system every question, question by question, so that a slow minute meets all of them."""
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        with Progress(*columns, console=self._console, refresh_per_second=REFRESH_PER_S) as progress:
            total = rounds * (len(self._children) * len(cases(text, steps=1, salt=0)) + 1)
            task = progress.add_task("warming up", total=total)
            self._warm_up(text, rounds)
            for index in range(rounds):
                before = cpu_time(self._pids(), self._clock)
                self._cases = cases(text, steps=self._steps, salt=index)
                for case in self._cases:
                    # Another one begins in each round: none always runs after the same neighbour.
                    first = index % len(self._children)
                    for child, rates in self._children[first:] + self._children[:first]:
                        progress.update(task, advance=1, description=f"{rates.contender.name}: {case.name}")
                        self._ask(child, rates, case)
                progress.update(task, advance=1, description="the machine itself")
                self._measure_machine()
                self._note_neighbours(others_cores(before, cpu_time(self._pids(), self._clock)))

    def grid(self, at: Sequence[tuple[int, int]]) -> dict[str, list[Point]]:
        """Our steps at several batches and contexts, by precision."""
        found: dict[str, list[Point]] = {}
        with self._console.status("how a step grows"):
            for child, rates in self._children:
                if rates.contender.is_ours:
                    found[rates.contender.precision] = [self._point(child, *place) for place in at]
        return found

    def figures(self) -> Figures:
        """What was found out; the machine's limits are the median of all rounds."""
        return Figures(
            config=self._config,
            cases=self._cases,
            limits=middle_of(self._limits),
            rates=[rates for _, rates in self._children],
            kv_bytes_per_token=self._kv_bytes,
            products_s=self._products_s,
        )

    def _started(self, contender: Contender, name: str) -> tuple[Child, str]:
        child = Child(
            contender.command,
            environment=contender.environment,
            log=self._run_dir / f"{name}.log",
            clock=self._clock,
        )
        self._stack.callback(child.close)
        try:
            return child, child.until_ready(contender.start_limit_s)
        except CoveyError:
            child.close()
            raise

    def _warm_up(self, text: Sequence[int], rounds: int) -> None:
        """The first step of a shape may compile, and the first touch of a page of memory costs, in any system."""
        for case in cases(text, steps=WARM_UP_STEPS, salt=rounds):
            if rounds > 1 or case.name in QUICK_WARM_UP:
                for child, rates in tuple(self._children):
                    self._ask(child, rates, case, is_counted=False)

    def _ask(self, child: Child, rates: Rates, case: Case, *, is_counted: bool = True) -> None:
        """Raises what our own fp32 runner fails with; else leaves out the case, if only we have it, or the system."""
        if case.ours_only and not rates.contender.is_ours:
            return
        try:
            result = child.ask(case.operation, ASK_LIMIT_S, **case.arguments)
        except CoveyError as error:
            if case.ours_only:
                self.leave_out(f"{case.name} in {rates.contender.precision}", str(error))
                return
            if rates.contender.is_ours and rates.contender.precision == "fp32":
                raise
            self.leave_out(f"{rates.contender.name} in {rates.contender.precision}", str(error))
            self._children = [(other, theirs) for other, theirs in self._children if other is not child]
            child.close()
            return
        if is_counted:
            rates.add(case.name, case.tokens_per_s(result))

    def _measure_machine(self) -> None:
        limits = self._ask_machine("limits")
        self._limits.append(Limits(**limits))
        asked = [case for case in self._cases if not case.ours_only and case.operation != "mixed"]
        sizes = dict.fromkeys((products_rows(case), case.sampled) for case in asked)
        for precision in self._kv_bytes:
            for rows, sampled in sizes:
                found = self._ask_machine("products", precision=precision, rows=rows, sampled=sampled)
                self._products_s.setdefault((precision, rows, sampled), []).append(found["fastest"])

    def _ask_machine(self, operation: str, **arguments: Any) -> Mapping[str, Any]:
        if self._machine is None:
            raise Unavailable("the machine's driver was not started")
        found: Mapping[str, Any] = self._machine.ask(operation, PRODUCTS_LIMIT_S, **arguments)
        return found

    def _point(self, child: Child, rows: int, context: int) -> Point:
        seconds = child.ask("grid", ASK_LIMIT_S, rows=rows, context=context, repeats=GRID_STEPS)
        return Point(rows=rows, context=context, seconds=median(seconds))

    def _pids(self) -> list[int]:
        return [child.pid for child, _ in self._children] + ([self._machine.pid] if self._machine else [])

    def _note_neighbours(self, cores: float) -> None:
        self.others_cores.append(cores)
        if is_disturbed(cores):
            self._console.print(f"disturbed: others used {cores:.2f} cores in this round", style="yellow")


def middle_of(found: Sequence[Limits]) -> Limits:
    """The median of several measurements of one machine, each the best of its repeats, as of all that is compared."""
    return Limits(
        read_bytes_per_s=median(limits.read_bytes_per_s for limits in found),
        operations_per_s={
            kind: median(limits.operations_per_s[kind] for limits in found) for kind in found[0].operations_per_s
        },
    )
