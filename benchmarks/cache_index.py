"""The semantic cache's store and index alone: look-ups beside inserts, memory, rebuilds, quota churn, growth."""

from __future__ import annotations

import gc
import os
import sys
import tempfile
from array import array
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from random import Random

import anyio
import numpy as np
import structlog
from rich.console import Console

from covey.clock import MonotonicClock
from covey.types.generate import FinishReason
from covey.types.ids import TenantId
from services.semcache.entry import LABEL_BITS, Document, Partition, Scope, Shelf
from services.semcache.library import Filing, Library
from services.semcache.memory import give_back_memory
from services.semcache.segment_files import SegmentFiles
from services.semcache.service import SWITCH_S
from services.semcache.sqlite import SqliteDocuments
from services.semcache.store import Store
from services.semcache.vectors import Vectors

from .report import Report

DIM = 384
NEIGHBOURS = 4
TAIL_MAX = 4096
ANSWER = "a cached answer of some length, as a model would give it. " * 8
NOISE = 0.02
"""What a query differs from its entry by, a component: a cosine of about 0.93."""
TICK_S = 0.002
SAMPLES = 1000
"""Entries that are asked for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """One case: so many entries in so many partitions, the largest with `largest` of them."""

    name: str
    entries: int
    partitions: int
    largest: int
    lookups: int
    inserts_s: float


QUICK = Size(name="10k", entries=10_000, partitions=100, largest=5_000, lookups=2_000, inserts_s=10.0)
FULL = Size(name="100k", entries=100_000, partitions=100, largest=50_000, lookups=10_000, inserts_s=60.0)
MILLION = Size(name="1m", entries=1_000_000, partitions=100, largest=500_000, lookups=10_000, inserts_s=60.0)


def run(console: Console, *, quick: bool, million: bool = False) -> Report:
    """Measure the sizes and the churn; `quick` ends within two minutes, the usual run takes about five."""
    sys.setswitchinterval(SWITCH_S)
    report = Report(bench="cache-index")
    sizes = (QUICK,) if quick else (QUICK, FULL, MILLION) if million else (QUICK, FULL)
    for size in sizes:
        anyio.run(_measure_size, report, console, size)
        gc.collect()
    quota, tail_max = (600, 256) if quick else (8_000, TAIL_MAX)
    anyio.run(_measure_churn, report, console, quota, tail_max)
    return report


async def _measure_size(report: Report, console: Console, size: Size) -> None:
    clock = MonotonicClock()
    before = _rss_bytes()
    async with _opened(size.entries) as bench:
        began = clock.now()
        await bench.fill(zipf_sizes(size))
        filled_at = clock.now()
        console.print(f"{size.name}: filed {size.entries:,} entries in {filled_at - began:.0f} s; building graphs")
        peak = [0]
        async with anyio.create_task_group() as tg:
            tg.start_soon(_watch_memory, peak)
            await bench.renew()
            tg.cancel_scope.cancel()
        gc.collect()
        steady = _rss_bytes()
        case = f"{size.name}-zipf"
        report.add(case=case, system="covey", metric="build_s", unit="s", samples=[clock.now() - filled_at])
        per_entry = (steady - before) / size.entries
        report.add(case=case, system="covey", metric="bytes_per_entry", unit="B", samples=[per_entry])
        report.add(
            case=case, system="covey", metric="rebuild_peak_mib", unit="MiB", samples=[(peak[0] - before) / 2**20]
        )
        bench.report(report, case, "document_from_disk", await bench.read(SAMPLES))
        await bench.look(2 * SAMPLES)
        quiet = await bench.look(size.lookups)
        bench.report(report, case, "lookup", quiet)
        busy = await _look_beside_inserts(bench, size, report, case)
        ratio = float(np.percentile(busy, 99) / np.percentile(quiet, 99))
        report.add(case=case, system="covey", metric="p99_beside_inserts_over_without", unit="x", samples=[ratio])
        console.print(
            f"{size.name}: {per_entry:.0f} B an entry, look-up p50 {1e3 * np.percentile(quiet, 50):.3f} ms, p99 "
            f"{1e3 * np.percentile(quiet, 99):.3f} ms, beside inserts {1e3 * np.percentile(busy, 99):.3f} ms"
        )


async def _look_beside_inserts(bench: _Bench, size: Size, report: Report, case: str) -> list[float]:
    stalls: list[float] = []
    busy: list[float] = []
    clock = MonotonicClock()
    until = clock.now() + size.inserts_s
    async with anyio.create_task_group() as tg:
        tg.start_soon(bench.renew_often)
        tg.start_soon(bench.insert, 50.0)
        tg.start_soon(_watch_loop, stalls)
        while clock.now() < until:
            busy += await bench.look(50)
            await anyio.sleep(0.01)
        tg.cancel_scope.cancel()
    bench.report(report, case, "lookup_beside_inserts", busy)
    report.add(case=case, system="covey", metric="loop_stall_max_ms", unit="ms", samples=[1e3 * max(stalls)])
    return busy


async def _measure_churn(report: Report, console: Console, quota: int, tail_max: int) -> None:
    """Four turnovers of one full partition; recall is against every live vector, compared one by one."""
    stalls: list[float] = []
    recalls: list[float] = []
    idle = await _idle_stalls()
    async with _opened(2 * quota, tail_max=tail_max) as bench:
        bench.quota, bench.is_churning = quota, True
        async with anyio.create_task_group() as tg:
            tg.start_soon(bench.renew_often)
            tg.start_soon(_watch_loop, stalls)
            for turnover in range(5):
                await bench.churn(quota)
                recalls.append(await bench.recall(200))
                console.print(
                    f"churn: turnover {turnover}, recall@1 {recalls[-1]:.3f}, stall {1e3 * max(stalls):.1f} ms"
                )
            tg.cancel_scope.cancel()
    case = f"churn-{quota}"
    report.add(case=case, system="covey", metric="recall_at_1", unit="share", samples=recalls[1:])
    report.add(case=case, system="covey", metric="loop_stall_max_ms", unit="ms", samples=[1e3 * max(stalls)])
    report.add(case=case, system="machine", metric="loop_stall_max_ms", unit="ms", samples=[1e3 * max(idle)])


async def _idle_stalls(seconds: float = 10.0) -> list[float]:
    """How late an event loop wakes on this machine when this process does nothing else."""
    stalls: list[float] = []
    with anyio.move_on_after(seconds):
        await _watch_loop(stalls)
    return stalls


class _Bench:
    """A library with its upkeep, filled with unit vectors that gather round some themes, as texts do."""

    def __init__(self, library: Library) -> None:
        self.library = library
        self.quota = 10**9
        self._clock = MonotonicClock()
        self._rng = np.random.default_rng(7)
        self._labels = Random(7)  # noqa: S311 - repeatable names, not secrets
        self._themes = self._rng.standard_normal((200, DIM)).astype(np.float32)
        self._shelves: list[Shelf] = []
        self._weights: list[int] = []
        self._samples: list[tuple[Shelf, Vectors]] = []
        self._asked: list[int] = []
        self.is_churning = False
        self._live: dict[int, Vectors] = {}

    async def fill(self, sizes: list[int]) -> None:
        """File entries as a restart does; only those that will be asked for get a document on disk."""
        share = SAMPLES / sum(sizes)
        for number, count in enumerate(sizes):
            self._shelves.append(_shelf(number))
            self._weights.append(count)
            for size in _chunks(count, 500):
                sampled: list[Document] = []
                for vector in self._vectors(size):
                    document = self._document(self._shelves[-1], vector)
                    self.library.store.add(document, None, quota_entries=self.quota)
                    self.library.store.index_vector(document.label, vector)
                    if self._labels.random() < share:
                        sampled.append(document)
                        self._asked.append(document.label)
                        self._samples.append((document.shelf, vector.copy()))
                await self.library.documents.put(sampled)

    async def renew(self) -> None:
        """Build every generation that is due."""
        store = self.library.store
        while (due := store.take_crowded()) is not None:
            shelf, index = due
            rebuild = index.rebuild()
            graph = await anyio.to_thread.run_sync(rebuild.build, abandon_on_cancel=True)
            store.adopt(shelf, index, rebuild, graph)
            spent = [rebuild]
            del rebuild, graph
            await anyio.to_thread.run_sync(spent.clear)
            await anyio.to_thread.run_sync(give_back_memory)

    async def renew_often(self) -> None:
        while True:
            await self.renew()
            await anyio.sleep(0.1)

    async def look(self, count: int) -> list[float]:
        """Look up near what was filed, whole partitions weighing what they hold; return the seconds of each."""
        seconds: list[float] = []
        for _ in range(count):
            shelf, vector = self._labels.choice(self._samples)
            asked = vector + NOISE * self._rng.standard_normal(DIM).astype(np.float32)
            asked /= np.linalg.norm(asked)
            began = self._clock.now()
            found = await self.library.store.nearest(shelf, asked, NEIGHBOURS)
            await self.library.fetch([held.label for held, similarity in found if similarity >= 0.9])
            seconds.append(self._clock.now() - began)
            await anyio.lowlevel.checkpoint()
        return seconds

    async def read(self, count: int) -> list[float]:
        """Read documents from the disk; return the seconds of each."""
        seconds: list[float] = []
        for label in self._labels.choices(self._asked, k=count):
            began = self._clock.now()
            await self.library.documents.get([label])
            seconds.append(self._clock.now() - began)
        return seconds

    async def insert(self, per_s: float) -> None:
        """Keep new entries at a rate, each acknowledged by the disk."""
        async with anyio.create_task_group() as tg:
            while True:
                tg.start_soon(self._insert_one)
                await anyio.sleep(1.0 / per_s)

    async def _insert_one(self) -> None:
        shelf = self._labels.choices(self._shelves, self._weights)[0]
        await self._put(shelf, self._vectors(1))

    async def churn(self, count: int) -> None:
        """Keep so many new entries in one partition, as fast as the disk takes them."""
        if not self._shelves:
            self._shelves = [_shelf(0)]
        for size in _chunks(count, 50):
            await self._put(self._shelves[0], self._vectors(size))
            await anyio.lowlevel.checkpoint()

    async def recall(self, count: int) -> float:
        """How often the nearest live entry, found by comparing with every one, comes first."""
        labels, rows = list(self._live), np.stack(list(self._live.values()))
        right = 0
        for asked in self._vectors(count):
            found = await self.library.store.nearest(self._shelves[0], asked, 1)
            right += found[0][0].label == labels[int(np.argmax(rows @ asked))]
        return right / count

    async def _put(self, shelf: Shelf, vectors: Vectors) -> None:
        filings = [
            Filing(document=self._document(shelf, vector), vector=vector, quota_entries=self.quota)
            for vector in vectors
        ]
        for filing, gone in zip(filings, await self.library.put(filings), strict=True):
            if self.is_churning and filing.vector is not None:
                self._live[filing.document.label] = filing.vector
                for label in gone or ():
                    self._live.pop(label, None)

    def _vectors(self, count: int) -> Vectors:
        themes = self._themes[self._rng.integers(0, len(self._themes), count)]
        vectors = themes + 1.5 * self._rng.standard_normal((count, DIM)).astype(np.float32)
        unit: Vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)
        return unit

    def _document(self, shelf: Shelf, vector: Vectors) -> Document:
        now = self._clock.now()
        return Document(
            label=self._labels.getrandbits(LABEL_BITS), shelf=shelf, asked_category="faq",
            exact_key=self._labels.randbytes(16), text="a question", answer=ANSWER, token_ids=array("I", range(100)),
            reason=FinishReason.STOP, prompt_tokens=20, completion_tokens=100, stored_at=now, expires_at=now + 86400,
            size_bytes=4000, vector=vector.tobytes(), encoder="bench",
        )  # fmt: skip

    def report(self, report: Report, case: str, metric: str, seconds: list[float]) -> None:
        milliseconds = [1e3 * value for value in seconds]
        for at in ("p50", "p99"):
            report.add(case=case, system="covey", metric=f"{metric}_ms", unit="ms", samples=milliseconds, at=at)


@asynccontextmanager
async def _opened(entries_max: int, *, tail_max: int = TAIL_MAX) -> AsyncIterator[_Bench]:
    """A library on a real disk, with the default share of documents in memory."""
    clock, log = MonotonicClock(), structlog.get_logger()
    with tempfile.TemporaryDirectory(prefix="covey-bench-") as folder:
        path = Path(folder) / "documents.sqlite3"
        async with SqliteDocuments.open(path, clock=clock, log=log, size_bytes_max=2**36) as documents:
            store = Store(entries_max=2 * entries_max, size_bytes_max=2**40, tail_max=tail_max)
            files = SegmentFiles(Path(folder) / "index", "bench", log)
            yield _Bench(
                Library(store, documents, encoder="bench", recent_bytes_max=2**26, clock=clock, log=log, files=files)
            )


def zipf_sizes(size: Size) -> list[int]:
    """Sizes of the partitions: the r-th is in proportion to r to the power that gives the largest its share."""
    low, high = 0.0, 10.0
    ranks = np.arange(1, size.partitions + 1, dtype=np.float64)
    for _ in range(60):
        power = (low + high) / 2
        share = 1.0 / float((ranks**-power).sum())
        low, high = (power, high) if share < size.largest / size.entries else (low, power)
    sizes = np.maximum(1, (size.entries * ranks**-power / (ranks**-power).sum()).astype(int))
    return [int(count) for count in sizes]


def _shelf(number: int) -> Shelf:
    return Shelf(Partition(Scope(TenantId(f"tenant{number}"), "m"), "faq"), b"context")


def _chunks(count: int, size: int) -> Iterator[int]:
    yield from (min(size, count - at) for at in range(0, count, size))


async def _watch_loop(stalls: list[float]) -> None:
    """Note how late the event loop wakes, in seconds."""
    clock = MonotonicClock()
    while True:
        began = clock.now()
        await anyio.sleep(TICK_S)
        stalls.append(clock.now() - began - TICK_S)


async def _watch_memory(peak: list[int]) -> None:
    while True:
        peak[0] = max(peak[0], _rss_bytes())
        await anyio.sleep(0.05)


def _rss_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
