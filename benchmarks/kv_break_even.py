"""Above which prompt length loading stored keys and values beats prefilling again on this machine."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import aclosing, asynccontextmanager, closing
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from statistics import median

import anyio

from covey.clock import Clock
from covey.engine.engine import Engine, open_engine
from covey.engine.limits import EngineLimits, Loading
from covey.errors import Unavailable
from covey.model.plan import Runner
from covey.model.runner import open_runner
from covey.model.source import resolve
from covey.model.tokenizer import Tokenizer, open_tokenizer
from covey.net.kv import KvClient, KvClientConfig, StoreNode
from covey.net.process import boot_id
from covey.net.rpc import Channels
from covey.testing import free_port
from covey.types.generate import GenerateRequest, Handover, KvScope, Role, Sampling, Tokens
from covey.types.ids import NamespaceId, RequestId, TenantId, WorkerId
from covey.types.store import BlockStore

LENGTHS = (64, 128, 256, 512, 1000, 2000)
QUICK_LENGTHS = (64, 256, 1000)
WAYS: tuple[Loading, ...] = ("layers", "whole")
STORE = WorkerId("kvstore")
STORE_BYTES = 512 << 20
POOL_BLOCKS = 80
START_TIMEOUT_S = 30.0
_SCOPE = KvScope(namespace=NamespaceId(b"break-even-bench"), chain_root=b"break-even")


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """Seconds from a request to its first decoded token, for one prompt length: the keys and values loaded layer by
    layer or whole, or computed again. `wait_s` is what a loading request waited for keys and values.
    """

    tokens: int
    layers_s: float
    whole_s: float
    prefill_s: float
    layers_wait_s: float
    whole_wait_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class BreakEven:
    """What the points say. With `load_s = fixed_s + s_per_loaded * tokens` and prefill at `s_per_token`, loading pays
    from `tokens` on; `fixed_tokens` and `factor` are the same line in tokens of prefill, as `gateway.routing` takes it.
    """

    transport: str
    points: tuple[Point, ...]
    fixed_s: float
    s_per_loaded: float
    s_per_token: float

    @property
    def factor(self) -> float:
        """What loading a token costs, in tokens of prefill."""
        return self.s_per_loaded / self.s_per_token

    @property
    def fixed_tokens(self) -> float:
        """What any load costs, in tokens of prefill."""
        return self.fixed_s / self.s_per_token

    @property
    def tokens(self) -> float:
        """The prompt length from which loading pays; infinite when it never does."""
        return self.fixed_tokens / (1 - self.factor) if self.factor < 1 else float("inf")


async def break_even(
    clock: Clock,
    *,
    run_dir: Path,
    cache_dir: Path,
    lengths: Sequence[int] = LENGTHS,
    rounds: int = 5,
    transport: KvClientConfig | None = None,
    on_point: Callable[[Point], None] = lambda _: None,
) -> BreakEven:
    """Measure the packaged model with a store process of its own. Raises Unavailable when that does not start."""
    config = transport or KvClientConfig()
    source = resolve("smollm2")
    vocabulary = open_tokenizer(source)
    runner = open_runner(source, cache_dir=cache_dir, n_blocks=POOL_BLOCKS)
    points = []
    with closing(runner):
        async with _store(run_dir, clock, config) as store:
            bench = _Bench(runner, vocabulary, store, clock)
            await bench.first_token_s(bench.prompt(64), "whole", None)  # what is slow once is not measured
            for length in lengths:
                points.append(await bench.point(length, rounds))
                on_point(points[-1])
    return fitted(points, config.transport)


def fitted(points: Sequence[Point], transport: str) -> BreakEven:
    """The lines through the points: what loading adds to one decode step, and what prefilling does."""
    if len(points) < 2:
        raise ValueError("a line needs two lengths")
    loads = [(p.tokens, p.layers_wait_s) for p in points]
    fixed_s, s_per_loaded = _line(loads)
    _, s_per_token = _line([(p.tokens, p.prefill_s) for p in points])
    return BreakEven(
        transport=transport,
        points=tuple(points),
        fixed_s=max(0.0, fixed_s),
        s_per_loaded=max(0.0, s_per_loaded),
        s_per_token=s_per_token,
    )


class _Bench:
    """One runner under engines that come and go, so that none finds blocks in its own cache."""

    def __init__(self, runner: Runner, vocabulary: Tokenizer, store: BlockStore, clock: Clock) -> None:
        self._runner = runner
        self._vocabulary = vocabulary
        self._store = store
        self._clock = clock
        self._rng = Random(1)  # noqa: S311 - prompts, not secrets
        self._asked = 0

    def prompt(self, length: int) -> GenerateRequest:
        """A request of random tokens."""
        self._asked += 1
        size = self._runner.info.vocab_size
        return GenerateRequest(
            request_id=RequestId(f"b{self._asked}"),
            tenant=TenantId("bench"),
            model="",
            scopes=(_SCOPE,),
            token_ids=tuple(self._rng.randrange(size) for _ in range(length)),
            sampling=Sampling(max_tokens=2, ignore_eos=True),
            deadline_s=120.0,
        )

    async def point(self, length: int, rounds: int) -> Point:
        """Take turns, so that what else the machine does, and warm caches, meet all ways alike."""
        took: dict[str, list[float]] = {way: [] for way in (*WAYS, "prefill")}
        waits: dict[str, list[float]] = {way: [] for way in WAYS}
        for turn in range(rounds):
            request = self.prompt(length)
            async with self._engine(Role.PREFILL, "whole", self._store) as prefill:
                handover = await _handed_over(prefill, request)
                resumed = replace(request, ticket=handover.ticket)
                for way in WAYS if turn % 2 else reversed(WAYS):
                    ttft_s, wait_s = await self.first_token_s(resumed, way, self._store)
                    took[way].append(ttft_s)
                    waits[way].append(wait_s)
                await prefill.cancel(request.request_id)
            took["prefill"].append((await self.first_token_s(request, "whole", None))[0])
        return Point(
            tokens=length,
            layers_s=median(took["layers"]),
            whole_s=median(took["whole"]),
            prefill_s=median(took["prefill"]),
            layers_wait_s=median(waits["layers"]),
            whole_wait_s=median(waits["whole"]),
        )

    async def first_token_s(
        self, request: GenerateRequest, loading: Loading, store: BlockStore | None
    ) -> tuple[float, float]:
        """Seconds to the first token of a decode engine, and of those the wait for keys and values."""
        async with self._engine(Role.DECODE, loading, store) as engine:
            began, first_s = self._clock.now(), 0.0
            async with aclosing(engine.generate(request)) as events:
                async for event in events:
                    if isinstance(event, Tokens) and not first_s:
                        first_s = self._clock.now() - began
            timings = getattr(event, "timings", None)
        if timings is None:
            raise Unavailable(f"the engine did not finish: {event}")
        return first_s, timings.kv_wait_s

    @asynccontextmanager
    async def _engine(self, role: Role, loading: Loading, store: BlockStore | None) -> AsyncIterator[Engine]:
        async with open_engine(
            self._runner,
            self._vocabulary,
            role=role,
            worker=WorkerId(f"bench-{role.value.lower()}"),
            clock=self._clock,
            limits=EngineLimits(loading=loading, grace_s=0.0, handover_ttl_s=60.0),
            store=store,
            model="",
        ) as engine:
            yield engine


async def _handed_over(engine: Engine, request: GenerateRequest) -> Handover:
    async with aclosing(engine.generate(request)) as events:
        async for event in events:
            if isinstance(event, Handover) and event.ticket.covered:
                return event
    raise Unavailable(f"the prompt was not stored: {event}")


@asynccontextmanager
async def _store(run_dir: Path, clock: Clock, config: KvClientConfig) -> AsyncIterator[BlockStore]:
    """A kvstore process and a client of it."""
    address = f"127.0.0.1:{free_port()}"
    read_fd, write_fd = os.pipe()
    settings = ("nats=", f"listen={address}", f"run_dir={run_dir}", f"arena_dir={run_dir}/arena", f"worker={STORE}")
    flags = [flag for s in (*settings, f"capacity_bytes={STORE_BYTES}", "drain_s=1") for flag in ("--set", s)]
    command = [sys.executable, "-m", "services.kvstore", "--ready-fd", str(write_fd), *flags]
    process = _started(command, write_fd, run_dir / "kvstore.log")
    try:
        with anyio.move_on_after(START_TIMEOUT_S):
            await anyio.wait_readable(read_fd)
        if not os.read(read_fd, 1):
            raise Unavailable((run_dir / "kvstore.log").read_text()[-2000:])
        async with Channels.open() as channels:
            nodes = (StoreNode(worker=STORE, address=address, capacity_bytes=STORE_BYTES),)
            yield KvClient(lambda: nodes, channels, clock=clock, boot_id=boot_id(), config=config)
    finally:
        os.close(read_fd)
        process.send_signal(signal.SIGTERM)
        await anyio.to_thread.run_sync(process.wait)


def _started(command: Sequence[str], ready_fd: int, log: Path) -> subprocess.Popen[bytes]:
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as sink:
        process = subprocess.Popen(command, pass_fds=(ready_fd,), stderr=sink)
    os.close(ready_fd)
    return process


def _line(points: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Intercept and slope of the least-squares line."""
    n = len(points)
    mean_x, mean_y = sum(x for x, _ in points) / n, sum(y for _, y in points) / n
    spread = sum((x - mean_x) ** 2 for x, _ in points)
    slope = sum((x - mean_x) * (y - mean_y) for x, y in points) / spread
    return mean_y - slope * mean_x, slope
