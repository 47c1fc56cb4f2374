"""The tiers of a node, put together from its settings, with their mover running."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from random import Random

import anyio

from covey.actor import Ref
from covey.clock import Clock
from covey.policy.tiering import Tiering
from covey.secretfile import read_secret
from covey.types import kv_state
from services.kvstore.store import Command, Store

from .below import Below, Encoder
from .config import DiskConfig, MoveConfig, RemoteConfig
from .demotion import Demotion
from .disk import DiskTier
from .engine import open_engine
from .memory import Memory
from .mover import Mover
from .promotion import Promotion
from .remote import RemoteTier
from .tier import Tier
from .tiers import Tiers


@asynccontextmanager
async def open_tiers(
    store: Store, actor: Ref[Command[object]], *, disk: DiskConfig, remote: RemoteConfig, move: MoveConfig,
    worker: str, clock: Clock, rng: Random, encoders: Mapping[kv_state.Tier, Encoder] | None = None,
) -> AsyncIterator[Tiers]:  # fmt: skip
    """Own the tiers of a store for a block, none if none are configured; `worker` is the name that a restart keeps.

    Raises `ConfigError`.
    """
    policy = Tiering(move.policy())
    memory = Memory(store, actor)
    async with AsyncExitStack() as stack:
        tiers: list[Tier] = []
        if disk.path:
            opened = DiskTier.open(_directory(disk.path, worker), disk.limits(), clock=clock, seed=rng.getrandbits(63))
            tiers.append(await stack.enter_async_context(opened))
        if remote.url:
            limits = remote.limits()
            secret = await anyio.to_thread.run_sync(_secret, remote.credentials_file)
            engine = open_engine(
                remote.url, endpoint=remote.endpoint, credentials=secret, timeout_s=remote.timeout_s
            )  # fmt: skip
            tiers.append(RemoteTier(await stack.enter_async_context(engine), limits=limits, clock=clock))
        below = Below(tiers, clock=clock, encoders=encoders)
        demotion = Demotion(memory, below)
        async with anyio.create_task_group() as tg:
            promotion = Promotion(tg, below.get, memory.take_in)
            mover = Mover(store.index, memory, below, demotion, policy)
            if tiers:
                tg.start_soon(mover.run, name="mover of tiers")
            yield Tiers(
                memory=memory, below=below, promotion=promotion, demotion=demotion, mover=mover, policy=policy
            )  # fmt: skip
            tg.cancel_scope.cancel()


def _directory(path: str, worker: str) -> Path:
    """Nodes of one configuration differ by name, and so do their directories."""
    return Path(path) / re.sub(r"[^A-Za-z0-9_-]", "_", worker) if worker else Path(path)


def _secret(path: str | None) -> str | None:
    return None if path is None else read_secret(Path(path))
