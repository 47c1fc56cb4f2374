"""Real processes: prefill, kvstore, decode and NATS; blocks travel, tokens stay, SIGTERM drains."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import anyio
import pytest

from covey.auth import MeshToken
from covey.cli.child import Child, ChildSpec
from covey.clock import MonotonicClock
from covey.codec.methods import Decode, KvStore, Prefill, ServerStream
from covey.net.embedded import EmbeddedNats
from covey.net.nats import NatsBus
from covey.net.registry import Registry
from covey.net.rpc import Channel, Channels
from covey.testing import assert_eventually
from covey.types.common import Empty
from covey.types.generate import (
    Afterwards,
    CancelRequest,
    Event,
    GenerateRequest,
    Handover,
    KvScope,
    RetainRequest,
    Role,
)
from covey.types.ids import RequestId
from tests.support.engines import Answer, is_whole, plain, request_of
from tests.support.kv_state import snapshot
from tests.support.tiny_llama import write_tiny_llama

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(120)]

TOKEN = "mesh-token-of-a-test-" * 2
BLOCK_SIZE = 16


@pytest.fixture(autouse=True)
def _no_blocking() -> None:
    """Off: starting children reads a pipe that is known to be readable."""


@dataclass
class Workers:
    """Children by name, and channels to them."""

    children: dict[str, Child]
    channels: Channels

    def to(self, name: str) -> Channel:
        return self.channels.to(self.children[name].addresses["grpc"])


@asynccontextmanager
async def workers(folder: Path, *, transport: str = "auto", stores: int = 2) -> AsyncIterator[Workers]:
    model = await anyio.to_thread.run_sync(write_tiny_llama, folder / "model")
    (folder / "token").write_text(TOKEN)
    (folder / "token").chmod(0o600)
    async with AsyncExitStack() as stack:
        nats = await stack.enter_async_context(EmbeddedNats.start(folder / "nats"))
        common = {
            "nats": nats.url, "nats_token_file": nats.token_file, "mesh_token_file": folder / "token",
            "run_dir": folder / "run", "drain_s": 5,
        }  # fmt: skip
        engine = common | {
            "model": model, "model_name": "tiny", "cache_dir": folder / "cache", "block_size": BLOCK_SIZE,
            "kv_blocks": 64, "kv_transport": transport,
        }  # fmt: skip
        plan = {f"kvstore-{i}": common | {"capacity_bytes": 64 << 20} for i in range(stores)}
        plan |= {"prefill-0": engine, "decode-0": engine}
        children: dict[str, Child] = {}

        async def start(name: str) -> None:
            settings = [flag for key, value in plan[name].items() for flag in ("--set", f"{key}={value}")]
            spec = ChildSpec(
                name=name,
                module=f"services.{name.partition('-')[0]}",
                flags=("--set", f"worker={name}", *settings),
                environment={"OMP_NUM_THREADS": "1"},
            )
            children[name] = await Child.start(spec, folder / f"{name}.log", timeout_s=60)
            stack.push_async_callback(children[name].kill)

        async with anyio.create_task_group() as tg:
            for name in plan:
                tg.start_soon(start, name)
        token = nats.token_file.read_text().strip()
        bus = await stack.enter_async_context(NatsBus.open(nats.url, token=token, name="test"))
        registry = await stack.enter_async_context(Registry.open(bus, clock=MonotonicClock()))
        await registry.until(lambda r: len(r.workers()) == len(plan), timeout_s=20)
        assert registry.workers(Role.DECODE)[0].record.engine is not None
        channels = await stack.enter_async_context(Channels.open(token=MeshToken(TOKEN)))
        yield Workers(children, channels)


async def ask(channel: Channel, method: ServerStream[GenerateRequest, Event], request: GenerateRequest) -> Answer:
    answer = Answer()
    async with channel.stream(method, request, timeout_s=60.0) as events:
        async for event in events:
            answer.events.append(event)
    return answer


def prompt(length: int, **fields: object) -> GenerateRequest:
    tokens = [(7 * i * i + length) % 250 for i in range(length)]
    return plain(request_of(tokens, request_id=f"r{length}", max_tokens=20), model="tiny", **fields)


@pytest.mark.parametrize("transport", ["auto", "grpc"])
async def test_split_equals_decode_alone(tmp_path: Path, transport: str) -> None:
    async with workers(tmp_path, transport=transport) as mesh:
        prefill, decode = mesh.to("prefill-0"), mesh.to("decode-0")
        for length in (5, 16, 37, 100):
            request = prompt(length)
            first = await ask(prefill, Prefill.GENERATE, request)
            assert isinstance(first.last, Handover), first.last
            rest = await ask(decode, Decode.GENERATE, replace(request, ticket=first.last.ticket))
            assert is_whole(rest, start=1)
            assert rest.last.usage.loaded_tokens == length
            assert rest.last.usage.blocks_moved == -(-length // BLOCK_SIZE)
            fresh = replace(request, request_id=RequestId(request.request_id + "-alone"), scopes=_scopes(b"other"))
            alone = await ask(decode, Decode.GENERATE, fresh)
            assert alone.last.usage.cached_tokens == 0
            assert first.ids + rest.ids == alone.ids
            assert first.text + rest.text == alone.text
            await prefill.call(Prefill.CANCEL, CancelRequest(request_id=request.request_id), timeout_s=5)
        assert sum(len(entry.hashes) for entry in (await snapshot(decode)).entries) > 10

        async def leases() -> int:
            stats = [await mesh.to(f"kvstore-{i}").call(KvStore.STATS, Empty(), timeout_s=5) for i in range(2)]
            assert sum(s.blocks for s in stats) > 10
            return sum(s.leases + s.private_blocks for s in stats)

        await assert_eventually(lambda: _is_zero(leases), timeout_s=10)


async def test_retain_demotes_and_sigterm_drains(tmp_path: Path) -> None:
    async with workers(tmp_path, stores=1) as mesh:
        decode, store = mesh.to("decode-0"), mesh.to("kvstore-0")
        answer = await ask(decode, Decode.GENERATE, prompt(40))
        request = RetainRequest(lease=answer.last.lease, ttl_s=0.2, then=Afterwards.DEMOTE)
        reply = await decode.call(Decode.RETAIN, request, timeout_s=5)
        assert reply.blocks == 3

        async def demoted() -> bool:
            return (await store.call(KvStore.STATS, Empty(), timeout_s=5)).blocks == 3

        await assert_eventually(demoted, timeout_s=10)

        async def unpinned() -> bool:
            return (await decode.call(Decode.LOAD, Empty(), timeout_s=5)).pinned_blocks == 0

        await assert_eventually(unpinned, timeout_s=5)
        long = replace(prompt(30), request_id=RequestId("long"), sampling=replace(prompt(30).sampling, max_tokens=400))
        answers: list[Answer] = []

        async def run() -> None:
            answers.append(await ask(decode, Decode.GENERATE, long))

        async with anyio.create_task_group() as tg:
            tg.start_soon(run)
            await assert_eventually(lambda: _is_running(decode), timeout_s=10)
            assert await mesh.children["decode-0"].stop(grace_s=20) == 0
        assert is_whole(answers[0])
        assert len(answers[0].ids) == 400
        assert await mesh.children["prefill-0"].stop(grace_s=10) == 0


async def test_a_missing_model_exits_with_three(tmp_path: Path) -> None:
    async with EmbeddedNats.start(tmp_path / "nats") as nats:
        settings = (f"nats={nats.url}", f"nats_token_file={nats.token_file}", "model=no-such-model")
        flags = [flag for text in (*settings, f"run_dir={tmp_path}") for flag in ("--set", text)]
        spec = ChildSpec(name="prefill", module="services.prefill", flags=tuple(flags))
        with pytest.raises(Exception, match=r"(?s)exit code 3.*no model 'no-such-model' here"):
            await Child.start(spec, tmp_path / "log", timeout_s=60)


def _scopes(root: bytes) -> tuple[KvScope, ...]:
    (scope,) = prompt(1).scopes
    return (replace(scope, chain_root=root),)


async def _is_zero(count: Callable[[], Awaitable[int]]) -> bool:
    return await count() == 0


async def _is_running(channel: Channel) -> bool:
    return (await channel.call(Decode.LOAD, Empty(), timeout_s=5)).running == 1
