"""A cache that starts again: every acknowledged entry is there, with its graph or without, and none was invented."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import numpy as np
import pytest
import structlog
from structlog.testing import capture_logs

from covey.policy.reuse import ReuseMode
from covey.testing import VirtualClock
from covey.types.program import CacheOutcome
from covey.types.semcache import FeedbackRequest, Verdict
from services.semcache.config import CategoryConfig, Config
from services.semcache.segment_files import SegmentFiles
from services.semcache.sqlite import SqliteDocuments
from tests.support.semcache import ACME, Parts, offer, query, running_cache

CONFIG = Config(exact_search_max=8, categories={"faq": CategoryConfig(mode=ReuseMode.SEMANTIC)})


@asynccontextmanager
async def started(folder: Path, clock: VirtualClock, *, encoder: str = "words") -> AsyncIterator[Parts]:
    log = structlog.get_logger()
    async with SqliteDocuments.open(folder / "d.sqlite3", clock=clock, log=log, size_bytes_max=1 << 26) as documents:
        files = SegmentFiles(folder / "index", encoder, log)
        async with running_cache(clock, CONFIG, documents=documents, files=files, encoder=encoder) as parts:
            yield parts
            await parts.upkeep.save()


def text(number: int) -> str:
    return f"topic word{number} detail{number * 7}"


async def fill(parts: Parts, count: int) -> None:
    for number in range(count):
        reply = await parts.cache.offer(offer(query(text(number)), f"answer {number}"), timeout_s=5.0)
        assert reply.stored, reply.why
    await parts.upkeep.once()


async def answers(parts: Parts, count: int) -> list[str]:
    found = []
    for number in range(count):
        reply = await parts.cache.lookup(query(text(number)), timeout_s=5.0)
        found.append(reply.answer.text if reply.answer is not None else "")
    return found


EXPECTED = [f"answer {number}" for number in range(40)]


async def test_a_restart_loads_the_graphs_and_serves_everything(tmp_path: Path, clock: VirtualClock) -> None:
    async with started(tmp_path, clock) as parts:
        await fill(parts, 40)
        late = await parts.cache.offer(offer(query("a late one", exact=b"k")), timeout_s=5.0)
        gone = await parts.cache.offer(offer(query("a wrong one", exact=b"w")), timeout_s=5.0)
        await parts.cache.feedback(FeedbackRequest(tenant=ACME, entry=gone.entry, verdict=Verdict.WRONG))
    async with started(tmp_path, clock) as parts:
        assert any(index.segments for _, index in parts.store.indexes()), "nothing was built again"
        assert await answers(parts, 40) == EXPECTED
        reply = await parts.cache.lookup(query("a late one", exact=b"k"), timeout_s=5.0)
        assert reply.answer is not None
        assert reply.answer.entry == late.entry
        assert (await parts.cache.lookup(query(exact=b"w"), timeout_s=5.0)).outcome is CacheOutcome.MISS
        assert len(parts.store) == 41
        parts.store.check()


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-10])


@pytest.mark.parametrize("damage", [flip, truncate, Path.unlink])
@pytest.mark.parametrize("suffix", [".hnsw", ".labels", ".json"])
async def test_damaged_index_files_are_built_again_from_the_documents(
    tmp_path: Path, clock: VirtualClock, suffix: str, damage: Callable[[Path], None]
) -> None:
    async with started(tmp_path, clock) as parts:
        await fill(parts, 40)
    for path in (tmp_path / "index").glob(f"*{suffix}"):
        damage(path)
    with capture_logs() as logs:
        async with started(tmp_path, clock) as parts:
            assert not any(index.segments for _, index in parts.store.indexes())
            assert await answers(parts, 40) == EXPECTED
            await parts.upkeep.once()
            assert await answers(parts, 40) == EXPECTED
            parts.store.check()
    if damage is not Path.unlink or suffix != ".json":
        assert any("index file not usable" in entry["event"] and entry["error"] for entry in logs)


async def test_another_encoders_vectors_are_set_aside_and_come_back_with_it(
    tmp_path: Path, clock: VirtualClock
) -> None:
    async with started(tmp_path, clock) as parts:
        await fill(parts, 40)
        await parts.cache.offer(offer(query("by its key", exact=b"k")), timeout_s=5.0)
    with capture_logs() as logs:
        async with started(tmp_path, clock, encoder="other") as parts:
            assert len(parts.store) == 41
            assert parts.store.indexes() == (), "no vector of another encoder is ever compared with"
            assert await answers(parts, 40) == [""] * 40
            assert (await parts.cache.lookup(query(exact=b"k"), timeout_s=5.0)).outcome is CacheOutcome.EXACT
    assert any("set aside" in entry["event"] for entry in logs)
    async with started(tmp_path, clock) as parts:
        assert await answers(parts, 40) == EXPECTED


async def test_nothing_expired_comes_back(tmp_path: Path, clock: VirtualClock) -> None:
    async with started(tmp_path, clock) as parts:
        await fill(parts, 12)
    clock.advance(86401)
    async with started(tmp_path, clock) as parts:
        assert len(parts.store) == 0
        parts.store.check()
    assert np.all([not path.is_file() or path.suffix == ".sqlite3" for path in (tmp_path / "index").glob("*")])
