"""What a worker process puts around its engine: the loaded model, the way to the store, gauges."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import anyio

from covey.clock import Clock
from covey.compression import Codebook
from covey.errors import InvalidArgument, Unavailable
from covey.model.plan import Runner
from covey.model.share import CoreShare
from covey.model.source import ModelSource
from covey.net.kv import KvClient, KvClientConfig, StoreNode
from covey.net.kv.agreed import AgreedRing
from covey.net.kv.codebook_file import read_codebook
from covey.net.kv.heap import keep_freed_memory
from covey.net.registry import Registry
from covey.net.rpc import Channels
from covey.types.block import BlockCodec
from covey.types.event import WorkerState
from covey.types.generate import Role
from covey.types.ids import WorkerId
from covey.types.store import BlockStore

from .actor import OnBlocks
from .borrowing import Neighbours
from .config import EngineConfig
from .engine import Engine, open_engine
from .text import Vocabulary
from .watchdog import watchdog

if TYPE_CHECKING:
    from covey.model.pool import KvDtype

SHARE_FILE = "engines.share"


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedModel:
    """A model that is ready to run."""

    runner: Runner
    vocabulary: Vocabulary
    name: str


@asynccontextmanager
async def open_worker(
    config: EngineConfig,
    *,
    role: Role,
    worker: WorkerId,
    clock: Clock,
    run_dir: Path,
    store: BlockStore,
    on_blocks: OnBlocks | None = None,
    neighbours: Neighbours | None = None,
) -> AsyncIterator[Engine]:
    """Load the model and run its engine under a watchdog. Raises Unavailable as `load_model` does."""
    model = await load_model(config, run_dir=run_dir, clock=clock)
    with closing(model.runner):
        async with open_engine(
            model.runner,
            model.vocabulary,
            role=role,
            worker=worker,
            clock=clock,
            limits=config.limits(),
            store=store,
            on_blocks=on_blocks,
            model=model.name,
            neighbours=neighbours,
            dialect=await anyio.to_thread.run_sync(_dialect, config),
            grace_s=config.drain_s,
        ) as engine:
            with watchdog(engine.board, clock, stuck_s=config.stuck_exit_s):
                yield engine


async def load_model(config: EngineConfig, *, run_dir: Path, clock: Clock) -> LoadedModel:
    """Load the model in a thread. Raises Unavailable, saying what to do, when torch or the model is not there."""
    return await anyio.to_thread.run_sync(_load_model, config, run_dir, clock)


async def store_client(
    config: EngineConfig, registry: Registry, channels: Channels, ring: AgreedRing, *, clock: Clock, host: str
) -> KvClient:
    """The store over the nodes that the registry knows at each call, placed as the ring says.

    Raises ConfigError when there is no codebook where the settings say.
    """
    keep_freed_memory()
    codebook = await anyio.to_thread.run_sync(_codebook, config)

    def nodes() -> Sequence[StoreNode]:
        return [
            StoreNode(
                worker=view.record.worker,
                address=view.record.address,
                capacity_bytes=view.record.store.arena_bytes,
                draining=view.record.state is WorkerState.DRAINING or view.load.draining,
                host=view.record.host,
            )
            for view in registry.workers(Role.KVSTORE)
            if view.record.store is not None
        ]

    return KvClient(
        nodes,
        channels,
        clock=clock,
        boot_id=host,
        config=KvClientConfig(
            transport=config.kv_transport,
            codecs=tuple(BlockCodec(name) for name in config.kv_codecs),
            codebook=codebook,
        ),
        agreed=lambda: ring.current,
    )


def gauges(engine: Engine) -> Mapping[tuple[str, ...], float]:
    """Load and counts of an engine, by name."""
    board = engine.board
    counts = {
        "steps": board.steps,
        "computed_tokens": board.computed_tokens,
        "generated_tokens": board.generated_tokens,
        "bare_handovers": board.bare_handovers,
        "written_ahead": board.written_ahead,
        "lent_blocks": board.lent_blocks,
        "attended_rows": board.attended_rows,
        "loans": board.loans,
        "demoted_blocks": board.demoted_blocks,
        "lost_demotions": board.lost_demotions,
        "verified_blocks": board.verified_blocks,
        "corrupt_blocks": board.corrupt_blocks,
        "drafted_tokens": board.drafted_tokens,
        "accepted_tokens": board.accepted_tokens,
        "preemptions": board.preemptions,
        "swapped_out": board.swapped_out,
    }
    return {(name,): float(value) for name, value in (asdict(engine.load()) | counts).items()}


def _codebook(config: EngineConfig) -> Codebook | None:
    return None if config.kv_codebook is None else read_codebook(config.kv_codebook, field="kv_codebook")


def _dialect(config: EngineConfig) -> str:
    """What this worker reads besides exact blocks: all that it computes depends on it."""
    if not config.kv_codecs:
        return ""
    codebook = _codebook(config) if "PQ4" in config.kv_codecs else None
    return "+".join(("", *sorted(set(config.kv_codecs)), *(() if codebook is None else (f"{codebook.id:016x}",))))


def _load_model(config: EngineConfig, run_dir: Path, clock: Clock) -> LoadedModel:
    try:
        from covey.model.pool import AUTO, Geometry
        from covey.model.source import resolve
        from covey.model.tokenizer import open_tokenizer
    except ImportError as error:
        raise Unavailable(f"{error.name} is not installed: pip install 'covey[engine]'") from error
    try:
        source = resolve(config.model)
        kv_dtype: KvDtype = AUTO[config.precision] if config.kv_dtype == "auto" else config.kv_dtype
        geometry = Geometry.of(source.config(), config.block_size, kv_dtype)
        tokenizer = open_tokenizer(source)
    except InvalidArgument as error:
        raise Unavailable(error.message) from error
    n_blocks = config.kv_blocks or config.kv_bytes // geometry.block_bytes
    if n_blocks < 1:
        raise InvalidArgument(f"less than one block of {geometry.block_bytes} bytes", field="kv_bytes")
    if config.device == "cpu":
        runner = _open_cpu(config, source, n_blocks, kv_dtype, run_dir, clock)
    else:
        runner = _open_gpu(config, source, n_blocks, kv_dtype)
    return LoadedModel(runner=runner, vocabulary=tokenizer, name=config.model_name or source.name)


def _open_cpu(
    config: EngineConfig, source: ModelSource, n_blocks: int, kv_dtype: KvDtype, run_dir: Path, clock: Clock
) -> Runner:
    from covey.model.runner import open_runner

    cores = tuple(sorted(os.sched_getaffinity(0)))[: config.threads]
    return open_runner(
        source,
        cache_dir=Path(config.cache_dir),
        n_blocks=n_blocks,
        block_size=config.block_size,
        context_limit=config.context_limit,
        share=CoreShare(run_dir / SHARE_FILE, clock=clock, cores=cores),
        precision=config.precision,
        kv_dtype=kv_dtype,
    )


def _open_gpu(config: EngineConfig, source: ModelSource, n_blocks: int, kv_dtype: KvDtype) -> Runner:
    from covey.model.gpu.device import find_device
    from covey.model.gpu.opening import open_gpu_runner
    from covey.model.loading import load

    find_device(config.device)  # before weights are converted for nothing
    loaded = load(
        source,
        cache_dir=Path(config.cache_dir),
        n_blocks=n_blocks,
        block_size=config.block_size,
        context_limit=config.context_limit,
        precision=config.precision,
        kv_dtype=kv_dtype,
    )
    return open_gpu_runner(loaded.info, loaded.config, loaded.geometry, loaded.weights, device=config.device)
