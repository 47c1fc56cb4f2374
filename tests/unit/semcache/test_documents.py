"""One contract of what keeps documents, held by memory and by SQLite; and what only a disk can do wrong."""

from __future__ import annotations

from array import array
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import anyio
import numpy as np
import pytest
import structlog

from covey.errors import FailedPrecondition, NoSpace, Unavailable
from covey.testing import VirtualClock, assert_eventually, free_port
from covey.types.generate import FinishReason
from covey.types.ids import TenantId
from services.semcache.documents import Documents, MemoryDocuments, Voided
from services.semcache.entry import Document, Partition, Scope, Shelf
from services.semcache.redis_documents import RedisDocuments
from services.semcache.sqlite import SqliteDocuments
from tests.support.engines_remote import REDIS

ACME = TenantId("acme")
MIB = 1 << 20


def document(label: int, *, answer: str = "an answer", tenant: TenantId = ACME, stored_at: float = 0.0) -> Document:
    vector = np.full(4, 0.5, dtype="<f4").tobytes()
    return Document(
        label=label, shelf=Shelf(Partition(Scope(tenant, "m"), "faq"), b"\x00c"), asked_category="", exact_key=b"k",
        text="an 'odd\x00' text ☃", answer=answer, token_ids=array("I", [1, 2**32 - 1]), reason=FinishReason.LENGTH,
        prompt_tokens=3, completion_tokens=2, stored_at=stored_at, expires_at=100.0 + label % 7, size_bytes=1000,
        tags=("a", "b"), vector=vector, encoder="words",
    )  # fmt: skip


@asynccontextmanager
async def opened(
    kind: str, folder: Path, clock: VirtualClock, size_bytes_max: int = 64 * MIB
) -> AsyncIterator[Documents]:
    if kind == "memory":
        yield MemoryDocuments()
        return
    if kind == "redis":
        if REDIS is None:
            pytest.skip("redis-server is not installed")
        async with redis_server() as url, RedisDocuments.open(url, clock=clock, log=structlog.get_logger()) as shared:
            yield shared
        return
    path = folder / "documents.sqlite3"
    async with SqliteDocuments.open(path, clock=clock, log=structlog.get_logger(), size_bytes_max=size_bytes_max) as it:
        yield it


@asynccontextmanager
async def redis_server() -> AsyncIterator[str]:
    """A server of its own for a block."""
    port = free_port()
    command = [str(REDIS), "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--dir", "/"]
    process = await anyio.open_process(command, stdout=None)
    url = f"redis://127.0.0.1:{port}/0"
    try:
        await assert_eventually(partial(_answers, url), timeout_s=10)
        yield url
    finally:
        process.kill()
        await process.wait()


async def _answers(url: str) -> bool:
    try:
        async with RedisDocuments.open(url, clock=VirtualClock(), log=structlog.get_logger()):
            return True
    except Unavailable:
        return False


async def _holds(documents: Documents, labels: list[int]) -> bool:
    return await everything(documents) == labels


async def everything(documents: Documents) -> list[int]:
    return [document.label async for batch in documents.load() for document in batch]


@pytest.mark.parametrize("kind", ["memory", "sqlite", "redis"])
async def test_what_was_put_is_there_whole_until_it_is_removed(kind: str, tmp_path: Path) -> None:
    clock = VirtualClock(wall_start=4e9)  # Redis has a clock of its own
    async with opened(kind, tmp_path, clock) as documents:
        kept = [document(label, stored_at=-label) for label in (1, 2, 2**61)]
        await documents.put(kept)
        (found,) = await documents.get([2**61, 7])
        assert (found.text, found.token_ids, found.tags, found.shelf) == (
            kept[2].text, kept[2].token_ids, kept[2].tags, kept[2].shelf,
        )  # fmt: skip
        assert found.expires_at == pytest.approx(kept[2].expires_at, abs=1e-3)
        assert await everything(documents) == [2**61, 2, 1], "the oldest first"
        await documents.put([document(2, answer="another")])
        assert [found.answer for found in await documents.get([2])] == ["another"]
        await documents.remove([2])
        documents.forget([1])
        await documents.put([document(3, stored_at=1.0)])
        await assert_eventually(partial(_holds, documents, [2**61, 3]))
        await documents.remove([3])
        assert await documents.standing(ACME) == Voided()
        await documents.void(ACME, Voided(epoch=3, reign=1), [2**61])
        assert await everything(documents) == []
        assert await documents.standing(ACME) == Voided(epoch=3, reign=1)


async def test_documents_keep_their_age_over_a_restart(tmp_path: Path, clock: VirtualClock) -> None:
    async with opened("sqlite", tmp_path, clock) as documents:
        await documents.put([document(1)])
        await documents.void(ACME, Voided(epoch=2), [])
    clock.advance(40)
    async with opened("sqlite", tmp_path, clock) as documents:
        ((found,),) = [batch async for batch in documents.load()]
        assert found.stored_at == pytest.approx(0.0, abs=1e-3)
        assert clock.now() - found.stored_at == pytest.approx(40, abs=1e-3)
        assert (await documents.standing(ACME)).epoch == 2


async def test_writes_that_wait_together_are_synced_together(tmp_path: Path, clock: VirtualClock) -> None:
    async with opened("sqlite", tmp_path, clock) as documents:
        async with anyio.create_task_group() as tg:
            for label in range(600):
                tg.start_soon(documents.put, [document(label)])
        assert len(await everything(documents)) == 600


async def test_a_full_disk_stops_writes_but_not_reads_and_recovers(tmp_path: Path, clock: VirtualClock) -> None:
    async with opened("sqlite", tmp_path, clock, size_bytes_max=MIB) as documents:
        kept = 0
        with pytest.raises(NoSpace, match="make room"):
            for kept in range(100):
                await documents.put([document(kept, answer="x" * 50_000)])
        assert 5 < kept < 30
        assert "full" in documents.writable
        assert len(await documents.get(list(range(100)))) == kept, "what was acknowledged is there, the rest is not"
        with pytest.raises(NoSpace):
            await documents.put([document(200)])
        documents.forget(range(5))
        clock.advance(2)
        await documents.put([document(201, answer="x" * 50_000)])
        assert documents.writable == ""
        assert 201 in await everything(documents)


async def test_two_processes_never_share_a_file(tmp_path: Path, clock: VirtualClock) -> None:
    async with opened("sqlite", tmp_path, clock):
        with pytest.raises(FailedPrecondition, match="worker"):
            async with opened("sqlite", tmp_path, clock):
                pytest.fail("opened twice")
