"""The way of a sequence over its workers: split, refused, lost, silent, resumed; what the client sees stays whole."""

from __future__ import annotations

from dataclasses import replace

import anyio
import pytest

from covey.errors import DeadlineExceeded, InvalidArgument, Overloaded, Unavailable
from covey.testing import assert_eventually
from covey.types.generate import Failed, Role
from covey.types.ids import RequestId
from covey.types.program import CacheMode, CallParams, ChoiceDone, Completed, Delta, Message, Started
from services.gateway.assembly import Gateway
from services.gateway.config import DispatchSettings
from services.gateway.job import Job, Prompt
from tests.support.fake_mesh import (
    MODEL,
    OTHER,
    TENANT,
    FakeMesh,
    FakeTokenizer,
    FakeWorker,
    expected_ids,
    fake_mesh,
    fast,
)

LONG = "tell me everything about graphs " * 6


def job(text: str = LONG, *, cache: CacheMode = CacheMode.BYPASS, deadline_s: float = 20.0, **params: object) -> Job:
    return Job(
        request_id=RequestId("r"),
        tenant=TENANT,
        model=MODEL,
        prompts=(Prompt(messages=(Message(role="user", content=text),)),),
        params=CallParams(temperature=0.0, **params),  # type: ignore[arg-type]
        cache=cache,
        deadline_at=anyio.current_time() + deadline_s,
    )


class Result:
    """What one client saw."""

    def __init__(self) -> None:
        self.events: list[object] = []

    @property
    def text(self) -> str:
        return "".join(e.text for e in self.events if isinstance(e, Delta))

    @property
    def ids(self) -> tuple[int, ...]:
        return tuple(i for e in self.events if isinstance(e, Delta) for i in e.ids)

    @property
    def end(self) -> Completed:
        assert isinstance(self.events[-1], Completed)
        return self.events[-1]


async def run(gateway: Gateway, wanted: Job) -> Result:
    result = Result()
    async with gateway.completions.open(wanted) as completion:
        async for event in completion:
            result.events.append(event)
    return result


def wanted_ids(text: str = LONG, count: int = 12) -> tuple[int, ...]:
    prompt = FakeTokenizer().encode_chat([{"role": "user", "content": text}])
    return expected_ids(tuple(prompt), count)


async def pair(mesh: FakeMesh, **faults: object) -> tuple[FakeWorker, FakeWorker]:
    """Two decode workers; the first, with the faults, is preferred."""
    bad = await mesh.add(FakeWorker(name="a-decode", role=Role.DECODE, **faults))  # type: ignore[arg-type]
    good = await mesh.add(FakeWorker(name="b-decode", role=Role.DECODE))
    return bad, good


async def test_decode_alone() -> None:
    async with fake_mesh() as mesh:
        worker = await mesh.add(FakeWorker(name="d", role=Role.DECODE))
        result = await run(await mesh.gateway(), job())
    assert result.ids == wanted_ids()
    assert [type(e) for e in result.events[:1] + result.events[-2:]] == [Started, ChoiceDone, Completed]
    assert not result.end.split
    (seen,) = worker.seen
    assert seen.ticket is None
    assert seen.resume is None
    assert len(seen.scopes) == 1
    assert len(seen.scopes[0].namespace) == 16


async def test_split_hands_over_and_adds_up_the_timings() -> None:
    async with fake_mesh() as mesh:
        prefill = await mesh.add(FakeWorker(name="p", role=Role.PREFILL))
        decode = await mesh.add(FakeWorker(name="d", role=Role.DECODE))
        result = await run(await mesh.gateway(fast(split="always")), job())
    assert result.ids == wanted_ids()
    assert result.end.split
    assert (result.end.usage.loaded_tokens, result.end.usage.blocks_moved) == (3, 2)
    assert (result.end.timings.prefill_s, result.end.timings.decode_s) == (0.25, 0.5)
    assert result.end.usage.prompt_tokens == len(prefill.seen[0].token_ids)
    ticket = decode.seen[0].ticket
    assert ticket is not None
    assert ticket.emitted == wanted_ids()[:1]
    assert decode.seen[0].scopes == prefill.seen[0].scopes
    assert decode.seen[0].resume is None


async def test_a_request_that_ends_with_its_first_token_never_reaches_decode() -> None:
    async with fake_mesh() as mesh:
        await mesh.add(FakeWorker(name="p", role=Role.PREFILL))
        decode = await mesh.add(FakeWorker(name="d", role=Role.DECODE))
        result = await run(await mesh.gateway(fast(split="always")), job(max_tokens=1))
    assert result.ids == wanted_ids(count=1)
    assert not decode.seen


@pytest.mark.parametrize("fault", [{"die_after": 5}, {"silent_after": 5}, {"skip_at": 5}])
async def test_a_worker_lost_in_mid_stream_is_replaced_without_a_seam(fault: dict[str, int]) -> None:
    async with fake_mesh() as mesh:
        bad, good = await pair(mesh, **fault)
        result = await run(await mesh.gateway(), job())
        assert result.ids == wanted_ids()
        assert result.text == "".join(map(chr, wanted_ids()))
        assert result.end.migrations == 1
        (seen,) = good.seen
        assert seen.attempt == 1
        assert seen.resume is not None
        assert seen.resume.emitted == wanted_ids()[:5]
        assert seen.resume.text_offset == 5
        reason = {"die_after": "gone", "silent_after": "silent", "skip_at": "broken"}[next(iter(fault))]
        assert mesh.metric("covey_migrations_total", reason=reason) == 1
        await assert_eventually(lambda: bad.running == 0)


async def test_a_worker_that_nobody_could_replace_gets_time_to_thaw() -> None:
    async with fake_mesh() as mesh:
        await mesh.add(FakeWorker(name="d", role=Role.DECODE, frozen_at=5, frozen_s=0.6))
        result = await run(await mesh.gateway(), job())
    assert result.ids == wanted_ids()
    assert result.end.migrations == 0


async def test_decode_lost_after_a_hand_over_resumes_with_the_ticket() -> None:
    async with fake_mesh() as mesh:
        await mesh.add(FakeWorker(name="p", role=Role.PREFILL))
        _, good = await pair(mesh, die_after=4)
        result = await run(await mesh.gateway(fast(split="always")), job())
    assert result.ids == wanted_ids()
    assert good.seen[0].ticket is not None
    assert good.seen[0].resume is not None
    assert good.seen[0].resume.emitted == wanted_ids()[:4]


async def test_prefill_lost_before_the_hand_over_is_retried_elsewhere() -> None:
    async with fake_mesh() as mesh:
        await mesh.add(FakeWorker(name="a-prefill", role=Role.PREFILL, die_after=0))
        other = await mesh.add(FakeWorker(name="b-prefill", role=Role.PREFILL))
        await mesh.add(FakeWorker(name="d", role=Role.DECODE))
        result = await run(await mesh.gateway(fast(split="always")), job())
    assert result.ids == wanted_ids()
    assert len(other.seen) == 1
    assert result.end.migrations == 1


async def test_late_events_of_another_attempt_are_dropped() -> None:
    async with fake_mesh() as mesh:
        await mesh.add(FakeWorker(name="d", role=Role.DECODE, stale_first=True))
        result = await run(await mesh.gateway(), job())
    assert result.ids == wanted_ids()


async def test_a_refusal_goes_to_another_worker_at_once() -> None:
    async with fake_mesh() as mesh:
        _, good = await pair(mesh, refuse=1, retry_after_ms=60_000)
        result = await run(await mesh.gateway(), job())
    assert result.ids == wanted_ids()
    assert result.end.migrations == 0
    assert good.seen[0].attempt == 0


async def test_refused_by_all_waits_in_the_gateway_until_there_is_room() -> None:
    async with fake_mesh() as mesh:
        worker = await mesh.add(FakeWorker(name="d", role=Role.DECODE, refuse=3))
        result = await run(await mesh.gateway(), job())
    assert result.ids == wanted_ids()
    assert len(worker.seen) == 4


async def test_refused_for_too_long_is_overloaded_with_a_hint() -> None:
    async with fake_mesh() as mesh:
        await mesh.add(FakeWorker(name="d", role=Role.DECODE, refuse=10_000, retry_after_ms=30))
        config = fast(dispatch=DispatchSettings(queue_wait_s=0.3))
        with pytest.raises(Overloaded) as caught:
            await run(await mesh.gateway(config), job())
    assert caught.value.retry_after_ms == 30


async def test_no_worker_is_answered_at_once() -> None:
    async with fake_mesh() as mesh:
        gateway = await mesh.gateway()
        for _ in range(2):  # the first pays for what is loaded lazily
            began = anyio.current_time()
            with pytest.raises(Unavailable, match=MODEL):
                await run(gateway, job())
    assert anyio.current_time() - began < 0.05


async def test_too_many_losses_are_a_typed_error() -> None:
    async with fake_mesh() as mesh:
        for i in range(4):
            await mesh.add(FakeWorker(name=f"d{i}", role=Role.DECODE, die_after=i))
        gateway = await mesh.gateway()
        with pytest.raises(Unavailable, match="given up"):
            await run(gateway, job())
    assert sum(len(w.seen) for w in mesh.directory.engines.values()) == 3


async def test_what_is_wrong_with_the_request_is_not_retried() -> None:
    async with fake_mesh() as mesh:
        failed = Failed(code="INVALID_ARGUMENT", message="no such grammar", field="grammar")
        _, good = await pair(mesh, fail=failed)
        with pytest.raises(InvalidArgument, match="no such grammar") as caught:
            await run(await mesh.gateway(), job())
    assert caught.value.field == "grammar"
    assert not good.seen


async def test_a_retryable_failure_moves_on() -> None:
    async with fake_mesh() as mesh:
        await pair(mesh, fail=Failed(code="INTERNAL", message="reference 1", retryable=True))
        result = await run(await mesh.gateway(), job())
    assert result.ids == wanted_ids()


async def test_a_lone_worker_that_comes_back_finishes_the_stream() -> None:
    async with fake_mesh() as mesh:
        restarted = await mesh.add(FakeWorker(name="d", role=Role.DECODE, epoch=2))
        record = mesh.directory.records.pop("d")
        await mesh.add(FakeWorker(name="d", role=Role.DECODE, die_after=3))
        gateway = await mesh.gateway()
        async with anyio.create_task_group() as tg:

            async def restart() -> None:
                await assert_eventually(lambda: mesh.metric("covey_migrations_total", reason="gone") == 1)
                mesh.directory.records["d"] = record

            tg.start_soon(restart)
            result = await run(gateway, job())
    assert result.ids == wanted_ids()
    assert restarted.seen[0].attempt == 1


async def test_leaving_cancels_the_worker() -> None:
    async with fake_mesh() as mesh:
        worker = await mesh.add(FakeWorker(name="d", role=Role.DECODE, pace_s=0.05, answer_tokens=1000))
        gateway = await mesh.gateway()
        async with gateway.completions.open(job(max_tokens=300)) as completion:
            async for event in completion:
                if isinstance(event, Delta):
                    break
        await assert_eventually(lambda: worker.running == 0, timeout_s=0.25)
    assert worker.cancelled == 1


async def test_the_deadline_ends_a_request() -> None:
    async with fake_mesh() as mesh:
        worker = await mesh.add(FakeWorker(name="d", role=Role.DECODE, pace_s=0.05))
        with pytest.raises(DeadlineExceeded):
            await run(await mesh.gateway(), job(deadline_s=0.2))
        await assert_eventually(lambda: worker.running == 0)


async def test_workers_with_another_tokenizer_are_not_asked() -> None:
    async with fake_mesh() as mesh:
        wrong = await mesh.add(FakeWorker(name="a", role=Role.DECODE, tokenizer_hash="another"))
        await mesh.add(FakeWorker(name="b", role=Role.DECODE))
        await run(await mesh.gateway(), job())
    assert not wrong.seen


async def test_tenants_have_chains_of_their_own() -> None:
    async with fake_mesh() as mesh:
        worker = await mesh.add(FakeWorker(name="d", role=Role.DECODE))
        gateway = await mesh.gateway()
        await run(gateway, job())
        await run(gateway, replace(job(), tenant=OTHER))
    first, second = (seen.scopes[0] for seen in worker.seen)
    assert first.namespace != second.namespace
    assert first.chain_root != second.chain_root


async def test_the_same_prompt_goes_back_to_the_worker_that_has_it() -> None:
    async with fake_mesh() as mesh:
        first, second = await pair(mesh)
        gateway = await mesh.gateway()
        second.load = replace(second.load, running=0)
        first.load = replace(first.load, running=50)
        await run(gateway, job())
        first.load = replace(first.load, running=0)
        await run(gateway, job())
    assert (len(first.seen), len(second.seen)) == (0, 2)


async def test_n_choices_have_seeds_of_their_own() -> None:
    async with fake_mesh() as mesh:
        worker = await mesh.add(FakeWorker(name="d", role=Role.DECODE))
        wanted = replace(job(), params=CallParams(temperature=0.7, seed=5, n=3))
        result = await run(await mesh.gateway(), wanted)
    assert sorted(seen.sampling.seed for seen in worker.seen) == [5, 6, 7]
    assert len({seen.request_id for seen in worker.seen}) == 3
    assert result.end.usage.prompt_tokens == len(worker.seen[0].token_ids)
    assert result.end.usage.completion_tokens == 36


async def test_a_slow_reader_loses_its_stream_and_holds_nobody_up() -> None:
    async with fake_mesh() as mesh:
        worker = await mesh.add(FakeWorker(name="d", role=Role.DECODE, answer_tokens=100))
        config = fast(dispatch=DispatchSettings(stream_events_max=8))
        gateway = await mesh.gateway(config)
        async with gateway.completions.open(job(max_tokens=100)) as completion:
            await assert_eventually(lambda: worker.seen and worker.running == 0)
            with pytest.raises(Overloaded, match="too slowly"):
                async for _ in completion:
                    pass


async def test_overload_is_answered_at_once() -> None:
    async with fake_mesh() as mesh:
        worker = await mesh.add(FakeWorker(name="d", role=Role.DECODE, gate=anyio.Event()))
        admission = fast().admission
        config = fast(admission=type(admission)(permits=1, queue_max=1))
        gateway = await mesh.gateway(config)
        async with anyio.create_task_group() as tg:
            for name in ("one", "two"):
                tg.start_soon(run, gateway, replace(job(), request_id=RequestId(name)))
            await assert_eventually(lambda: mesh.metric("covey_num_requests_waiting") == 1)
            began = anyio.current_time()
            with pytest.raises(Overloaded) as caught:
                await run(gateway, replace(job(), request_id=RequestId("three")))
            assert anyio.current_time() - began < 0.05
            assert caught.value.retry_after_ms
            assert worker.gate is not None
            worker.gate.set()
    assert mesh.metric("covey_num_requests_running") == 0
