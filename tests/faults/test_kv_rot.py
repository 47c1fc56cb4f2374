"""A kvstore is killed, its disk rots, it starts anew: blocks are back, damage is a quarantined miss, text is golden."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

import anyio
import pytest

from covey.clock import MonotonicClock
from covey.codec.methods import KvStore
from covey.engine.limits import EngineLimits
from covey.model.runner import TorchRunner, open_runner
from covey.model.tokenizer import Tokenizer, open_tokenizer
from covey.net.kv import KvClient, StoreNode
from covey.net.rpc import Channel, Channels
from covey.testing import assert_eventually
from covey.types.common import Empty
from covey.types.generate import GenerateRequest, Handover, Role
from covey.types.ids import WorkerId
from covey.types.kv_state import StartTask, TaskKind, TaskRequest, TaskState, TaskStatus, Tier
from tests.contract.kv_stores import BOOT_ID, StoreProcess, flip_byte, store_process
from tests.support.engines import TENANT, collect, is_whole, plain, request_of, running_engine
from tests.support.tiny_llama import write_tiny_llama

pytestmark = [pytest.mark.faults, pytest.mark.timeout(120)]

BLOCK = 16
LENGTH = 200
WHOLE = LENGTH // BLOCK * BLOCK
Damage = Callable[[list[Path]], None]


def _nothing(_: list[Path]) -> None:
    return


def _bit(files: list[Path]) -> None:
    flip_byte(files[0], files[0].stat().st_size // 2)


def _truncated(files: list[Path]) -> None:
    os.truncate(files[0], files[0].stat().st_size * 2 // 3)


def _swapped(files: list[Path]) -> None:
    first, second = (path.read_bytes() for path in files[:2])
    files[0].write_bytes(second)
    files[1].write_bytes(first)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def runner(folder: Path) -> TorchRunner:
    return open_runner(str(folder), cache_dir=folder / "cache", n_blocks=64, block_size=BLOCK)


@pytest.fixture(scope="module")
def vocabulary(folder: Path) -> Tokenizer:
    return open_tokenizer(str(folder))


@pytest.fixture
def process(tmp_path: Path) -> Iterator[StoreProcess]:
    disk = (f"disk.path={tmp_path / 'tier'}", "disk.capacity_bytes=67108864", "disk.segment_bytes=65536")
    with store_process(tmp_path, *disk) as process:
        yield process


def prompt() -> GenerateRequest:
    rng = Random(5)
    tokens = [rng.randrange(250) for _ in range(LENGTH)]
    return plain(request_of(tokens, request_id="rot", max_tokens=12), model="")


async def _task(channel: Channel, **fields: Any) -> TaskStatus:
    status = await channel.call(KvStore.START, StartTask(tenant=TENANT, **fields), timeout_s=5)

    async def ended() -> bool:
        nonlocal status
        status = await channel.call(KvStore.GET_TASK, TaskRequest(task=status.task), timeout_s=5)
        return status.state is not TaskState.RUNNING

    await assert_eventually(ended, 10)
    return status


@pytest.mark.parametrize("damage", [_nothing, _bit, _truncated, _swapped])
async def test_a_store_that_comes_back_with_what_is_left_of_its_disk(
    damage: Damage, process: StoreProcess, runner: TorchRunner, vocabulary: Tokenizer, tmp_path: Path
) -> None:
    request = prompt()
    node = StoreNode(worker=WorkerId("kv-0"), address=process.address, capacity_bytes=1 << 20)
    async with running_engine(runner, vocabulary=vocabulary) as engine:
        golden = (await collect(engine, request)).ids
    async with Channels.open() as channels:
        store = KvClient(lambda: [node], channels, clock=MonotonicClock(), boot_id=BOOT_ID)
        channel = channels.to(process.address)
        async with running_engine(runner, role=Role.PREFILL, vocabulary=vocabulary, store=store, name="p") as engine:
            assert isinstance((await collect(engine, request)).last, Handover)
            await engine.cancel(request.request_id)
        assert (await _task(channel, kind=TaskKind.DEMOTE, tier=Tier.DISK)).done == LENGTH // BLOCK
    await anyio.to_thread.run_sync(process.kill)
    damage(sorted((tmp_path / "tier").rglob("*.kv")))
    await anyio.to_thread.run_sync(process.start)
    limits = EngineLimits(kv_timeout_s=4.0)
    async with Channels.open() as channels:
        store = KvClient(lambda: [node], channels, clock=MonotonicClock(), boot_id=BOOT_ID)
        async with running_engine(runner, vocabulary=vocabulary, store=store, limits=limits) as engine:
            answer = await collect(engine, request)
        assert is_whole(answer)
        assert answer.ids == golden
        loaded = answer.last.usage.loaded_tokens
        stats = await channels.to(process.address).call(KvStore.STATS, Empty(), timeout_s=5)
        if damage is _nothing:
            assert loaded == WHOLE
            assert stats.quarantined == 0
        else:
            assert loaded < WHOLE
            assert stats.quarantined >= 1
