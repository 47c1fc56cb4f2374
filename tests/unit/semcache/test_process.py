"""The service as a process: ready before its encoder, a round trip over gRPC, the encoder later, a drained end."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import anyio
import pytest
from anyio.abc import Process

from covey.clock import MonotonicClock
from covey.codec.methods import SemCache
from covey.net.embedded import EmbeddedNats
from covey.net.nats import NatsBus
from covey.net.registry import Registry
from covey.net.rpc import Channel
from covey.testing import assert_eventually
from covey.types.common import Empty
from covey.types.event import WorkerRecord
from covey.types.generate import Role
from covey.types.program import CacheOutcome, EmbedRequest
from services.semcache.minilm import PACKAGED
from tests.support.semcache import offer, query

pytestmark = [pytest.mark.slow, pytest.mark.e2e]

READY_S = 15.0
LOADED_S = 60.0


@asynccontextmanager
async def running_service(run_dir: Path, nats: EmbeddedNats, *flags: str) -> AsyncIterator[Process]:
    """Start the service and wait for its readiness byte; on leaving kill it if it still runs."""
    readable, writable = os.pipe()
    common = [f"nats={nats.url}", f"nats_token_file={nats.token_file}", f"run_dir={run_dir}"]
    sets = [word for setting in common for word in ("--set", setting)]
    command = [sys.executable, "-P", "-m", "services.semcache", *sets, *flags, "--ready-fd", str(writable)]
    process = await anyio.open_process(
        command, stdout=None, stderr=None, pass_fds=(writable,), env=os.environ | {"PYTHONPATH": str(Path.cwd())}
    )
    os.close(writable)
    try:
        with anyio.fail_after(READY_S):
            await anyio.wait_readable(readable)
        assert os.read(readable, 1)
        yield process
    finally:
        os.close(readable)
        if process.returncode is None:
            process.kill()
        await process.wait()


async def semcache_of(registry: Registry) -> WorkerRecord:
    await registry.until(lambda r: bool(r.workers(Role.SEMCACHE)), timeout_s=10)
    return registry.workers(Role.SEMCACHE)[0].record


async def test_a_process_is_ready_on_its_exact_tier_then_learns_to_embed_and_drains(tmp_path: Path) -> None:
    faq = '{"mode": "semantic", "tau": 0.85}'
    async with (
        EmbeddedNats.start(tmp_path) as nats,
        running_service(tmp_path, nats, "--set", f"categories.faq={faq}") as process,
        NatsBus.open(nats.url, token=nats.token) as bus,
        Registry.open(bus, clock=MonotonicClock()) as registry,
    ):
        record = await semcache_of(registry)
        assert record.labels["embedding_model"] == PACKAGED
        async with Channel.open(record.address) as channel:
            exact = query("hello", exact=b"k", category="")
            assert (await channel.call(SemCache.LOOKUP, exact, timeout_s=5)).outcome is CacheOutcome.MISS
            assert (await channel.call(SemCache.OFFER, offer(exact, "hi"), timeout_s=5)).stored
            reply = await channel.call(SemCache.LOOKUP, exact, timeout_s=5)
            assert reply.outcome is CacheOutcome.EXACT
            assert reply.answer is not None
            assert reply.answer.text == "hi"
            assert not (await channel.call(SemCache.STATS, Empty(), timeout_s=5)).encoder_ready
            embedded = await channel.call(
                SemCache.EMBED, EmbedRequest(model=PACKAGED, inputs=("a text",)), timeout_s=LOADED_S
            )
            assert len(embedded.vectors[0].values) == 384
            assert (await channel.call(SemCache.STATS, Empty(), timeout_s=5)).encoder_ready
            stored = await channel.call(SemCache.OFFER, offer(query("How do I reset my password?")), timeout_s=5)
            assert stored.stored
            hit = await channel.call(SemCache.LOOKUP, query("How can I reset my password"), timeout_s=5)
            assert hit.outcome is CacheOutcome.SEMANTIC
        process.send_signal(signal.SIGTERM)
        with anyio.fail_after(10):
            assert await process.wait() == 0
        await assert_eventually(lambda: not registry.workers(Role.SEMCACHE))


async def test_stopping_while_the_encoder_loads_ends_well(tmp_path: Path) -> None:
    async with EmbeddedNats.start(tmp_path) as nats, running_service(tmp_path, nats) as process:
        process.send_signal(signal.SIGTERM)
        with anyio.fail_after(20):
            assert await process.wait() == 0


async def test_a_model_that_is_not_here_ends_the_start_with_exit_code_2(tmp_path: Path) -> None:
    settings = ("encoder=sentence-transformers/all-mpnet-base-v2", f"run_dir={tmp_path}")
    command = [sys.executable, "-P", "-m", "services.semcache", *(w for text in settings for w in ("--set", text))]
    with anyio.fail_after(20):
        done = await anyio.run_process(command, check=False, env=os.environ | {"PYTHONPATH": str(Path.cwd())})
    assert done.returncode == 2
    assert b"nothing is ever downloaded" in done.stderr
