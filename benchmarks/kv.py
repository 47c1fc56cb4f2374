"""`covey bench kv`: our store by every transport, other stores, and the machine's memory, in turn."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks.child import Child, OperationFailed
from benchmarks.contenders import Contender
from benchmarks.kv_cases import LOOKUPS, OPERATIONS, TRANSPORTS, Load, loads
from benchmarks.kv_contenders import memory, ours, peers
from benchmarks.kv_figures import Figures
from benchmarks.kv_placement import moved_share
from benchmarks.kv_plots import kv_plot
from benchmarks.neighbours import cpu_time, is_disturbed, others_cores
from benchmarks.report import Report
from covey.clock import Clock, MonotonicClock
from covey.errors import CoveyError

ROUNDS, QUICK_ROUNDS = 15, 5
WARM_UPS = 2
LOOKUP_REPEATS, QUICK_LOOKUP_REPEATS = 200, 60
ASK_LIMIT_S = 120.0
REFRESH_PER_S = 1.0
REASON_CHARS = 300


def run(run_dir: Path, console: Console, *, quick: bool, with_peers: bool, plots: Path) -> Report:
    """Measure everything in turn and draw the plot; a peer that fails is left out, and the reason printed.

    Raises:
        CoveyError: our own store, or the machine's own measurement, fails.
    """
    report = Report("kv")
    bench = KvBench(run_dir, console, MonotonicClock(), quick=quick)
    with bench:
        bench.start(ours(run_dir), memory())
        if with_peers:
            theirs, missing = peers()
            for name, reason in missing.items():
                bench.leave_out(name, reason)
            for contender in theirs:
                bench.start_peer(contender)
        bench.measure()
    bench.figures.moved_share = moved_share(3, 4)
    bench.figures.write(report)
    report.add(case="machine", system="others", metric="others_cores", unit="cores", samples=bench.others_cores)
    kv_plot(plots / "kv.png", bench.figures)
    return report


class KvBench:
    """All systems started and standing still but the one that is asked. A context manager: leaving it ends them."""

    def __init__(self, run_dir: Path, console: Console, clock: Clock, *, quick: bool) -> None:
        self.figures = Figures()
        self.others_cores: list[float] = []
        self._run_dir, self._console, self._clock = run_dir, console, clock
        self._rounds = QUICK_ROUNDS if quick else ROUNDS
        self._lookups = QUICK_LOOKUP_REPEATS if quick else LOOKUP_REPEATS
        self._stack = ExitStack()
        self._children: dict[str, Child] = {}
        self._peers: list[str] = []
        self._failed: set[tuple[str, Load]] = set()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def leave_out(self, name: str, reason: str) -> None:
        """Say why a system is not in the report."""
        self._console.print(f"{name} is left out: {reason}", markup=False)

    def start(self, *contenders: Contender) -> None:
        """Start what must be there."""
        for contender in contenders:
            with self._console.status(f"starting {contender.name}"):
                child = Child(
                    contender.command,
                    environment=contender.environment,
                    log=self._run_dir / f"{contender.name}.log",
                    clock=self._clock,
                )
                self._stack.callback(child.close)
                self.figures.versions[contender.name] = child.until_ready(contender.start_limit_s)
                self._children[contender.name] = child

    def start_peer(self, contender: Contender) -> None:
        """Start a peer, or say why it is left out."""
        try:
            self.start(contender)
        except CoveyError as error:
            self.leave_out(contender.name, str(error))
        else:
            self._peers.append(contender.name)

    def measure(self) -> None:
        """Ask all systems for the same load, one after the other, so that a slow minute meets all of them."""
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        with Progress(*columns, console=self._console, refresh_per_second=REFRESH_PER_S) as progress:
            questions = len(loads()) + len(LOOKUPS)
            task = progress.add_task("warming up", total=questions * self._rounds + len(loads()) * WARM_UPS)
            for index in range(WARM_UPS):
                for load in loads():
                    progress.update(task, advance=1)
                    self._round(load, index, is_counted=False)
            for index in range(self._rounds):
                before = cpu_time(self._pids(), self._clock)
                for load in loads():
                    progress.update(task, advance=1, description=f"{load.word}, {load.clients} clients")
                    self._round(load, index, is_counted=True)
                for blocks in LOOKUPS:
                    progress.update(task, advance=1, description=f"look-ups of {blocks} blocks")
                    self._lookup(blocks)
                self._note_neighbours(others_cores(before, cpu_time(self._pids(), self._clock)))

    def _round(self, load: Load, index: int, *, is_counted: bool) -> None:
        """One operation of each kind by every system; another one begins each time."""
        systems = [("covey", transport) for transport in TRANSPORTS] + [(peer, "") for peer in self._peers]
        first = index % len(systems)
        for name, transport in systems[first:] + systems[:first]:
            if name not in self._children or (name, load) in self._failed:
                continue
            for operation in OPERATIONS:
                rate = self._rate(name, operation, load, transport)
                if rate is None:
                    break
                if is_counted and transport:
                    self.figures.ours[operation, load, transport].append(rate)
                elif is_counted:
                    self.figures.theirs[name, operation, load].append(rate)
        took_s = self._children["memcpy"].ask("copy", ASK_LIMIT_S, size=load.size_bytes)
        if is_counted:
            self.figures.memcpy[load].append(load.batch_bytes / took_s)

    def _rate(self, name: str, operation: str, load: Load, transport: str) -> float | None:
        """Bytes a second; None for a peer that fails: it is not asked for this load again, nor at all if it ended.

        Raises what ours fails with.
        """
        arguments: dict[str, Any] = {"size": load.size_bytes, "clients": load.clients}
        if transport:
            arguments["transport"] = transport
        try:
            took_s = self._children[name].ask(operation, ASK_LIMIT_S, **arguments)
        except OperationFailed as error:
            if transport:
                raise
            self.leave_out(f"{name} at {load.case('tcp')}", str(error)[:REASON_CHARS])
            self._failed.add((name, load))
            return None
        except CoveyError as error:
            if transport:
                raise
            self.leave_out(f"{name} from {load.case('tcp')} on", str(error)[:REASON_CHARS])
            self._children.pop(name).close()
            return None
        return load.batch_bytes / float(took_s)

    def _lookup(self, blocks: int) -> None:
        found = self._children["covey"].ask("lookup", ASK_LIMIT_S, blocks=blocks, repeats=self._lookups)
        self.figures.lookups_s[blocks].append(found["lookup_s"])
        self.figures.empty_calls_s[blocks].append(found["empty_call_s"])
        self.figures.rpcs_s[blocks].append(found["rpc_s"])

    def _pids(self) -> list[int]:
        return [pid for child in self._children.values() for pid in group_of(child.pid)]

    def _note_neighbours(self, cores: float) -> None:
        self.others_cores.append(cores)
        if is_disturbed(cores):
            self._console.print(f"disturbed: others used {cores:.2f} cores in this round", style="yellow")


def group_of(leader: int) -> Iterator[int]:
    """The processes of a driver's group: servers of its own are part of what is measured."""
    for entry in os.scandir("/proc"):
        if entry.name.isdigit():
            try:
                if os.getpgid(int(entry.name)) == leader:
                    yield int(entry.name)
            except ProcessLookupError:
                continue
