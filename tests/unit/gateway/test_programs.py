"""Programs over real gRPC: graphs that run by themselves, errors that wake every waiter, bounds, tenants, cancels."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import anyio
import pytest

from covey.auth import MeshToken
from covey.codec.methods import Programs
from covey.errors import (
    AlreadyExists,
    Cancelled,
    ContextLengthExceeded,
    CoveyError,
    DeadlineExceeded,
    InvalidArgument,
    NotFound,
)
from covey.net.rpc import Channel
from covey.testing import assert_eventually
from covey.types.generate import FinishReason, Role
from covey.types.ids import CallId
from covey.types.program import (
    AckValues,
    CacheMode,
    CacheOutcome,
    CancelCalls,
    GetVariable,
    OpenProgram,
    ProgramRequest,
    SemanticCall,
    SetVariable,
    ToolHint,
    VariableDelta,
)
from services.gateway.config import ProgramSettings
from tests.support.fake_mesh import CONTEXT, MODEL, OTHER_KEY, FakeMesh, FakeSemCache, FakeWorker, fast
from tests.support.grpc_edge import LATENCY, Client, answer, call, edge, opened


async def worker_of(mesh: FakeMesh, **faults: Any) -> FakeWorker:
    return await mesh.add(FakeWorker(name="d", role=Role.DECODE, **faults))


async def test_a_chain_runs_by_itself_and_values_flow() -> None:
    async with edge() as (mesh, channel):
        await worker_of(mesh)
        client = await opened(channel)
        reply = await client.submit(call("b", "and {{ out_a }}"), call("a", "say {{topic}}"), topic="cats")
        value = await client.get("out_b")
    assert set(reply.accepted) == {"a", "b"}
    assert value.value == answer(f"and {answer('say cats')}")
    assert (value.call_id, value.reason, value.worker) == ("b", FinishReason.STOP, "d")
    assert value.usage is not None
    assert value.usage.completion_tokens == 12


async def test_calls_that_name_no_model_are_answered_from_the_cache_too() -> None:
    async with edge() as (mesh, channel):
        worker = await worker_of(mesh)
        cache = await mesh.add_semcache(FakeSemCache())
        client = await opened(channel)
        await client.submit(replace(call("a", "say cats"), cache=CacheMode.USE))
        first = await client.get("out_a")
        await assert_eventually(lambda: cache.offers)
        await client.submit(replace(call("b", "say cats"), cache=CacheMode.USE))
        second = await client.get("out_b")
    assert (first.cache, second.cache) == (CacheOutcome.MISS, CacheOutcome.EXACT)
    assert first.value == second.value
    assert len(worker.seen) == 1
    assert {query.model for query in cache.queries} == {MODEL}


async def test_a_value_set_later_releases_what_waits() -> None:
    async with edge() as (mesh, channel):
        worker = await worker_of(mesh)
        client = await opened(channel)
        await client.submit(call("a", "x"))
        await client.get("out_a")
        with pytest.raises(InvalidArgument, match="'later'"):
            await client.submit(call("b", "{{later}}"))
        request = SetVariable(program_id=client.program_id, name="later", value="now")
        await channel.call(Programs.SET, request, timeout_s=5)
        await channel.call(Programs.SET, request, timeout_s=5)  # the same again is no error
        await client.submit(call("b", "{{later}}"))
        assert (await client.get("out_b")).value == answer("now")
        with pytest.raises(AlreadyExists, match="'later'"):
            await client.submit(later="other")
    assert len(worker.seen) == 2


@pytest.mark.parametrize(
    ("calls", "error", "words", "field"),
    [
        ([call("a", "{{out_b}}"), call("b", "{{out_a}}")], InvalidArgument, ("'a'", "'out_b'"), "calls[0].messages"),
        ([call("a", "{{nope}}")], InvalidArgument, ("'a'", "'nope'"), "calls[0].messages"),
        ([call("a", "x"), call("a", "x")], InvalidArgument, ("'a'", "twice"), "calls[1].call_id"),
        ([call("a", "x", n=2)], InvalidArgument, ("'a'", "n must be 1"), "calls[0].params.n"),
    ],
)
async def test_bad_graphs_are_named_and_run_nothing(
    calls: list[SemanticCall], error: type[CoveyError], words: tuple[str, ...], field: str
) -> None:
    async with edge() as (mesh, channel):
        worker = await worker_of(mesh)
        client = await opened(channel)
        with pytest.raises(error) as caught:
            await client.submit(*calls)
    assert all(word in caught.value.message for word in words)
    assert caught.value.field == field
    assert not worker.seen


async def test_a_known_call_is_not_run_again_and_another_body_is_refused() -> None:
    async with edge() as (mesh, channel):
        worker = await worker_of(mesh)
        client = await opened(channel)
        await client.submit(call("a", "x"), topic="t")
        await client.get("out_a")
        again = await client.submit(call("a", "x"), topic="t")
        assert (again.accepted, again.known) == ((), ("a",))
        with pytest.raises(AlreadyExists, match="'a'"):
            await client.submit(call("a", "y"))
    assert len(worker.seen) == 1


async def test_the_same_key_opens_the_same_program_of_a_tenant() -> None:
    async with edge() as (_, channel):
        first = await channel.call(Programs.OPEN, OpenProgram(idempotency_key="k"), timeout_s=5)
        again = await channel.call(Programs.OPEN, OpenProgram(idempotency_key="k"), timeout_s=5)
        async with Channel.open(channel.address, token=MeshToken(OTHER_KEY)) as stranger:
            other = await stranger.call(Programs.OPEN, OpenProgram(idempotency_key="k"), timeout_s=5)
            with pytest.raises(NotFound):
                await Client(stranger, first.program_id).submit(x="1")
    assert (again.program_id, again.existing) == (first.program_id, True)
    assert (other.existing, other.program_id == first.program_id) == (False, False)


async def test_a_failed_producer_wakes_every_waiter_downstream() -> None:
    async with edge() as (mesh, channel):
        await worker_of(mesh)
        client = await opened(channel)
        failures: list[CoveyError] = []

        async def wait(name: str) -> None:
            with pytest.raises(ContextLengthExceeded) as caught:
                await client.get(name)
            failures.append(caught.value)

        await client.submit(
            call("a", "{{text}}"), call("b", "{{out_a}}"), call("c", "{{out_b}}"), text="x" * (CONTEXT + 100)
        )
        async with anyio.create_task_group() as tg:
            for name in ("out_a", "out_a", "out_b", "out_c"):
                tg.start_soon(wait, name)
        late = await client.submit(call("e", "{{out_c}}"))
        assert late.accepted == ("e",)
        await wait("out_e")
    assert len(failures) == 5
    assert any("'c'" in f.message and "'out_a'" in f.message for f in failures)


async def test_get_has_a_timeout_and_names_unknown_variables() -> None:
    async with edge() as (mesh, channel):
        await worker_of(mesh, gate=anyio.Event())
        client = await opened(channel)
        await client.submit(call("a", "x"))
        with pytest.raises(DeadlineExceeded, match="out_a"):
            await client.get("out_a", timeout_s=0.05)
        with pytest.raises(NotFound, match="out_z"):
            await client.get("out_z")


async def test_a_variable_streams_as_it_is_produced_and_again_later() -> None:
    async with edge() as (mesh, channel):
        await worker_of(mesh, pace_s=0.01)
        client = await opened(channel)
        await client.submit(call("a", "x"))
        request = GetVariable(program_id=client.program_id, name="out_a", objective=LATENCY, timeout_s=5)
        for _ in range(2):
            text, values = "", []
            async with channel.stream(Programs.STREAM, request, timeout_s=5) as events:
                async for event in events:
                    if isinstance(event, VariableDelta):
                        text += event.text
                    else:
                        values.append(event)
            assert text == values[0].value == answer("x")
            assert len(values) == 1


async def test_calls_stick_to_the_worker_and_a_tool_pins_the_blocks() -> None:
    async with edge() as (mesh, channel):
        first = await mesh.add(FakeWorker(name="a", role=Role.DECODE))
        second = await mesh.add(FakeWorker(name="b", role=Role.DECODE))
        client = await opened(channel)
        hint = ToolHint(tool="shell", expected_s=4.0)
        await client.submit(call("one", "x", tool=hint), call("two", "{{out_one}} and more"))
        await client.get("out_two")
        await assert_eventually(lambda: first.retained or second.retained)
    used = [w for w in (first, second) if w.seen]
    assert len(used) == 1
    (pin,) = used[0].retained
    assert (pin.ttl_s, pin.program_id) == (6.5, client.program_id)
    assert pin.lease == f"l-{used[0].name}"
    assert used[0].seen[0].program_id == client.program_id


async def test_objectives_become_priorities_and_groups() -> None:
    async with edge(fast(programs=ProgramSettings(running_max=1))) as (mesh, channel):
        gate = anyio.Event()
        worker = await worker_of(mesh, gate=gate)
        client = await opened(channel)
        await client.submit(call("first", "x"))  # holds the only place while the others are submitted
        await client.submit(call("m1", "1"), call("m2", "2"), call("r", "{{out_m1}}{{out_m2}}"), call("urgent", "3"))
        async with anyio.create_task_group() as tg:
            tg.start_soon(client.get, "out_r")
            tg.start_soon(client.get, "out_urgent")
            await assert_eventually(lambda: len(worker.seen) == 1)
            await anyio.sleep(0.05)
            gate.set()
    order = [seen.call_id for seen in worker.seen]
    hints = {seen.call_id: dict(seen.hints) for seen in worker.seen}
    assert order[0] == "first"
    assert order.index(CallId("urgent")) < order.index(CallId("m1"))
    assert hints[CallId("m1")] == {"objective": "THROUGHPUT", "depth": "1", "group": "r"}
    assert hints[CallId("r")]["objective"] == "LATENCY"


async def test_cancel_stops_decoding_before_it_returns() -> None:
    async with edge() as (mesh, channel):
        worker = await worker_of(mesh, pace_s=0.02, answer_tokens=400)
        client = await opened(channel)
        await client.submit(call("a", "x"), call("b", "{{out_a}}"))
        await assert_eventually(lambda: worker.running == 1)
        await channel.call(Programs.CANCEL, CancelCalls(program_id=client.program_id), timeout_s=5)
        await assert_eventually(lambda: worker.running == 0, timeout_s=0.25)
        for name in ("out_a", "out_b"):
            with pytest.raises(Cancelled):
                await client.get(name)
        with pytest.raises(NotFound):
            missing = CancelCalls(program_id=client.program_id, calls=(CallId("z"),))
            await channel.call(Programs.CANCEL, missing, timeout_s=5)


async def test_close_and_expiry_free_everything() -> None:
    async with edge() as (mesh, channel):
        worker = await worker_of(mesh, pace_s=0.02, answer_tokens=400)
        closed, expiring = await opened(channel), await opened(channel, ttl_s=1.0)
        for client in (closed, expiring):
            await client.submit(call("a", "x"))
        await assert_eventually(lambda: worker.running == 2)
        await channel.call(Programs.CLOSE, ProgramRequest(program_id=closed.program_id), timeout_s=5)
        await assert_eventually(lambda: worker.running == 0)
        assert mesh.metric("covey_num_programs") == 0
        for client in (closed, expiring):
            with pytest.raises(NotFound):
                await client.get("out_a")


async def test_a_programs_deadline_fails_what_is_left() -> None:
    async with edge() as (mesh, channel):
        worker = await worker_of(mesh, pace_s=0.05, answer_tokens=400)
        client = await opened(channel, deadline_s=0.3)
        await client.submit(call("a", "x"))
        with pytest.raises(DeadlineExceeded):
            await client.get("out_a")
        await assert_eventually(lambda: worker.running == 0)


async def test_a_fork_has_the_values_and_goes_its_own_way() -> None:
    async with edge() as (mesh, channel):
        await worker_of(mesh)
        client = await opened(channel)
        await client.submit(call("a", "x"), topic="t")
        await client.get("out_a")
        handle = await channel.call(Programs.FORK, ProgramRequest(program_id=client.program_id), timeout_s=5)
        fork = Client(channel, handle.program_id)
        await fork.submit(call("b", "{{out_a}} {{topic}}"))
        assert (await fork.get("out_b")).value == answer(f"{answer('x')} t")
        with pytest.raises(NotFound):
            await client.get("out_b")


async def test_acknowledged_values_make_room_when_there_is_none() -> None:
    async with edge(fast(programs=ProgramSettings(bytes_max=300))) as (mesh, channel):
        await worker_of(mesh)
        client = await opened(channel)
        await client.submit(big="x" * 250)
        with pytest.raises(CoveyError, match="300"):
            await client.submit(more="y" * 100)
        await channel.call(Programs.ACK, AckValues(program_id=client.program_id, names=("big",)), timeout_s=5)
        await client.submit(more="y" * 100)
        with pytest.raises(NotFound, match="forgotten"):
            await client.get("big")
        with pytest.raises(InvalidArgument, match="'big'"):
            await client.submit(call("a", "{{big}}"))


async def test_ten_thousand_calls_are_bounded_by_the_places() -> None:
    async with edge(fast(programs=ProgramSettings(running_max=4))) as (mesh, channel):
        worker = await worker_of(mesh, gate=anyio.Event())
        client = await opened(channel)
        await client.submit(*(call(f"c{i}", "x") for i in range(3000)))
        await assert_eventually(lambda: worker.running == 4)
        await anyio.wait_all_tasks_blocked()
        assert len(worker.seen) == 4
