"""Lossy blocks of a real store serve engines that name their codec, and no others."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import anyio
import pytest

from covey.clock import MonotonicClock
from covey.codec.methods import KvStore
from covey.compression import Codebook
from covey.config import ConfigError
from covey.engine.config import EngineConfig
from covey.engine.worker import open_worker
from covey.model.loading import load
from covey.model.source import resolve
from covey.net.kv import KvClient
from covey.net.rpc import Channel, Channels
from covey.types.block import BlockCodec
from covey.types.generate import Finished, Handover, Role
from covey.types.ids import WorkerId
from covey.types.kv_state import StartTask, TaskKind, TaskRequest, TaskState
from tests.contract.kv_stores import StoreProcess, client_of, store_process
from tests.support.engines import SCOPE, TENANT, Answer, Shelf, collect, plain, request_of
from tests.support.tiny_llama import write_tiny_llama
from tests.unit.compression.blocks import codebook_for

PROMPT = tuple(range(3, 83))
BLOCK = 8


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="module")
def codebook(model: Path) -> Path:
    """One that fits the model's blocks and knows nothing of their numbers: what it decodes is far off."""
    loaded = load(resolve(str(model)), cache_dir=model.parent / "cache", n_blocks=1, block_size=BLOCK)
    file = model.parent / "book.pq"
    file.write_bytes(codebook_for(loaded.info.shape).to_bytes())
    return file


@pytest.fixture(scope="module")
def node(codebook: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[StoreProcess]:
    sets = (f"codecs.codebook={codebook}", "codecs.error_max=1.0", "codecs.recent_blocks=0")
    with store_process(tmp_path_factory.mktemp("store"), *sets) as process:
        yield process


async def answer_of(model: Path, tmp_path: Path, store: KvClient | Shelf, role: Role = Role.DECODE) -> Answer:
    """What a fresh worker says to the prompt, greedily."""
    config = EngineConfig(
        model=str(model), cache_dir=str(model.parent / "cache"), kv_blocks=32, block_size=BLOCK, kv_dtype="fp32"
    )
    opened = open_worker(
        config, role=role, worker=WorkerId(role.value), clock=MonotonicClock(), run_dir=tmp_path, store=store
    )
    async with opened as engine:
        return await collect(engine, plain(request_of(PROMPT, max_tokens=24), model=""))


async def recode(channel: Channel) -> None:
    task = StartTask(kind=TaskKind.RECODE, tenant=TENANT, namespace=SCOPE.namespace, codec=BlockCodec.PQ4)
    status = await channel.call(KvStore.START, task, timeout_s=5)
    with anyio.fail_after(20):
        while status.state is TaskState.RUNNING:
            await anyio.sleep(0.01)
            status = await channel.call(KvStore.GET_TASK, TaskRequest(task=status.task), timeout_s=5)
    assert status.state is TaskState.DONE
    assert status.why == f"{status.total} recoded"
    assert status.total >= len(PROMPT) // BLOCK


async def test_without_permission_lossy_blocks_are_never_read(
    model: Path, codebook: Path, node: StoreProcess, tmp_path: Path
) -> None:
    golden = await answer_of(model, tmp_path, Shelf())
    async with Channels.open() as channels:
        exact = client_of(node, channels, "auto")
        book = Codebook.from_bytes(codebook.read_bytes())
        lossy = client_of(node, channels, "auto", codecs=(BlockCodec.PQ4,), codebook=book)
        assert isinstance((await answer_of(model, tmp_path, exact, Role.PREFILL)).last, Handover)
        loaded = await answer_of(model, tmp_path, exact)
        assert isinstance(loaded.last, Finished)
        assert loaded.last.usage.loaded_tokens >= len(PROMPT) - BLOCK
        assert loaded.ids == golden.ids

        await recode(channels.to(node.address))
        without = await answer_of(model, tmp_path, exact)
        assert isinstance(without.last, Finished)
        assert without.last.usage.loaded_tokens == 0
        assert without.ids == golden.ids

        await recode(channels.to(node.address))  # that worker has put its own exact blocks in their place
        allowed = await answer_of(model, tmp_path, lossy)
        assert isinstance(allowed.last, Finished)
        assert allowed.last.usage.loaded_tokens >= len(PROMPT) - BLOCK
        assert allowed.ids != golden.ids, "such a codebook leaves little of the prompt"


async def test_workers_that_read_lossy_blocks_share_none_with_others(
    model: Path, codebook: Path, tmp_path: Path
) -> None:
    async def fingerprint(**settings: object) -> str:
        base = {"model": str(model), "cache_dir": str(model.parent / "cache"), "kv_blocks": 8, "block_size": BLOCK}
        config = EngineConfig(**(base | settings))  # type: ignore[arg-type]
        opened = open_worker(
            config, role=Role.DECODE, worker=WorkerId("w"), clock=MonotonicClock(), run_dir=tmp_path, store=Shelf()
        )
        async with opened as engine:
            return engine.info().layout_fingerprint

    plainly, half = await fingerprint(), await fingerprint(kv_codecs=("FP16",))
    quarter = await fingerprint(kv_codecs=("PQ4",), kv_codebook=str(codebook))
    assert len({plainly, half, quarter}) == 3
    assert half.startswith(plainly)


def test_a_codebook_that_is_wanted_is_named() -> None:
    with pytest.raises(ValueError, match="kv_codebook"):
        EngineConfig(kv_codecs=("PQ4",))


async def test_a_codebook_that_is_not_there_is_told(model: Path, tmp_path: Path) -> None:
    config = EngineConfig(
        model=str(model), cache_dir=str(model.parent / "cache"), kv_blocks=8, block_size=BLOCK,
        kv_codecs=("PQ4",), kv_codebook=str(tmp_path / "nothing"),
    )  # fmt: skip
    opened = open_worker(
        config, role=Role.DECODE, worker=WorkerId("w"), clock=MonotonicClock(), run_dir=tmp_path, store=Shelf()
    )
    with pytest.raises(ConfigError, match="No such file"):
        async with opened:
            pass
