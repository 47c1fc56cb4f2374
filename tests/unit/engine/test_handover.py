"""Prefill to store to decode: the tokens are those of one engine, whatever breaks on the way."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace

import anyio
import pytest

from covey import failpoint
from covey.engine.engine import Engine
from covey.engine.fake import FakeRunner
from covey.engine.limits import EngineLimits
from covey.testing import assert_eventually
from covey.types.block import BlockShape
from covey.types.generate import (
    AdoptRequest,
    Failed,
    Finished,
    FinishReason,
    GenerateRequest,
    Handover,
    Resume,
    Role,
)
from covey.types.ids import RequestId, TenantId
from tests.support.engines import Answer, Shelf, assert_idle, collect, is_whole, plain, request_of, running_engine

LENGTHS = (1, 7, 8, 9, 16, 29, 32)


@asynccontextmanager
async def split(
    shelf: Shelf, decode_runner: FakeRunner | None = None, limits: EngineLimits | None = None
) -> AsyncIterator[tuple[Engine, Engine]]:
    """A prefill and a decode engine around one store."""
    async with (
        running_engine(role=Role.PREFILL, store=shelf, name="p", limits=limits) as prefill,
        running_engine(decode_runner, role=Role.DECODE, store=shelf, name="d", limits=limits) as decode,
    ):
        yield prefill, decode


async def alone(request: GenerateRequest) -> Answer:
    async with running_engine() as engine:
        return await collect(engine, request)


def joined(first: Answer, rest: Answer) -> tuple[tuple[int, ...], str]:
    return first.ids + rest.ids, first.text + rest.text


@pytest.mark.parametrize("length", LENGTHS)
async def test_split_equals_one_engine(length: int) -> None:
    request = request_of(tuple(range(1, length + 1)), max_tokens=20, temperature=0.5, seed=9, frequency_penalty=0.1)
    expected = await alone(request)
    shelf, runner = Shelf(), FakeRunner()
    async with split(shelf, runner) as (prefill, decode):
        first = await collect(prefill, request)
        assert is_whole(first)
        assert isinstance(first.last, Handover)
        assert len(first.ids) == 1
        ticket = first.last.ticket
        assert ticket.covered == length
        assert len(ticket.hashes) == length // 8
        assert (ticket.tail is None) == (length % 8 == 0)
        rest = await collect(decode, plain(request, ticket=ticket))
        assert is_whole(rest, start=1)
        assert joined(first, rest) == (expected.ids, expected.text)
        assert rest.last.usage.loaded_tokens == length
        assert rest.last.usage.blocks_moved == -(-length // 8)
        assert runner.computed == 19  # no prompt token was computed again
        await prefill.cancel(request.request_id)
        await assert_eventually(lambda: shelf.stats.private_blocks == 0)
        await assert_idle(prefill)
        await assert_eventually(lambda: shelf.stats.leases == 0)


async def test_a_first_token_that_ends_needs_no_handover() -> None:
    shelf = Shelf()
    async with split(shelf) as (prefill, _):
        answer = await collect(prefill, request_of(range(1, 20), max_tokens=1))
        assert isinstance(answer.last, Finished)
        assert answer.last.reason is FinishReason.LENGTH
        assert len(answer.ids) == 1
        assert is_whole(answer)
        await assert_eventually(lambda: shelf.stats.blocks == 2)  # written back for the next turn
        await assert_idle(prefill)


async def test_a_stored_prefix_is_loaded_not_computed() -> None:
    shelf = Shelf()
    prompt = tuple(range(1, 40))
    expected = await alone(request_of(prompt))
    async with split(shelf) as (prefill, _):
        await collect(prefill, request_of(prompt, request_id="0"))
    runner = FakeRunner()
    async with running_engine(runner, role=Role.PREFILL, store=shelf) as second:
        answer = await collect(second, request_of(prompt, request_id="1"))
        assert answer.last.usage.loaded_tokens == 32
        assert runner.computed == 7
        assert answer.ids == expected.ids[:1]
        assert answer.last.usage.blocks_moved == 4 + 1  # four loaded, only the tail stored


@pytest.mark.parametrize("broken", [0, 1, 2, "tail"])
async def test_a_corrupt_or_missing_block_is_recomputed(broken: int | str) -> None:
    prompt = tuple(range(1, 31))
    request = request_of(prompt, max_tokens=20)
    expected = await alone(request)
    for is_corrupt in (True, False):
        shelf = Shelf()
        async with split(shelf) as (prefill, decode):
            first = await collect(prefill, request)
            ticket = first.last.ticket
            name = ticket.tail.key if broken == "tail" else ticket.hashes[int(broken)]
            if is_corrupt:
                shelf.corrupt(name, BlockShape(size_bytes=decode.info().block_bytes, layers=decode.info().layers))
            else:
                shelf.remove(name)
            rest = await collect(decode, plain(request, ticket=ticket))
            assert joined(first, rest) == (expected.ids, expected.text)
            assert isinstance(rest.last, Finished)
            assert rest.last.usage.loaded_tokens < 30
            await assert_idle(decode, pinned=None)


async def test_decode_recomputes_when_the_store_is_gone_or_slow() -> None:
    request = request_of(tuple(range(1, 31)), max_tokens=20)
    expected = await alone(request)
    for fault in ("down", "slow"):
        shelf = Shelf()
        async with split(shelf, limits=EngineLimits(kv_timeout_s=0.2)) as (prefill, decode):
            first = await collect(prefill, request)
            shelf.is_down, shelf.slow_s = fault == "down", 5.0 if fault == "slow" else 0.0
            rest = await collect(decode, plain(request, ticket=first.last.ticket))
            assert joined(first, rest) == (expected.ids, expected.text)


@pytest.mark.parametrize("has_store", [True, False])
async def test_a_store_that_takes_nothing_costs_a_second_prefill_only(has_store: bool) -> None:
    request = request_of(tuple(range(1, 31)), max_tokens=20)
    expected = await alone(request)
    shelf = Shelf()
    shelf.is_down = True
    async with (
        running_engine(role=Role.PREFILL, store=shelf if has_store else None, name="p") as prefill,
        running_engine(store=shelf if has_store else None, name="d") as decode,
    ):
        first = await collect(prefill, request)
        assert isinstance(first.last, Handover)
        assert (first.last.ticket.hashes, first.last.ticket.tail, first.last.ticket.covered) == ((), None, 0)
        assert prefill.board.bare_handovers == 1
        rest = await collect(decode, plain(request, ticket=first.last.ticket))
        assert joined(first, rest) == (expected.ids, expected.text)
        assert is_whole(rest, start=1)
        assert shelf.stats.leases == 0
        await assert_idle(prefill)


async def test_a_fault_before_handover_leaves_no_lease() -> None:
    shelf = Shelf()
    async with split(shelf) as (prefill, _):
        failpoint.arm("prefill.before_handover=error@1")
        request = request_of(range(1, 20))
        answer = await collect(prefill, request)
        assert isinstance(answer.last, Failed)
        assert answer.last.retryable
        retry = await collect(prefill, plain(request, attempt=1))
        assert isinstance(retry.last, Handover)
        await prefill.cancel(request.request_id)
        await assert_eventually(lambda: shelf.stats.leases == 0)
        await assert_idle(prefill)


async def test_handover_leases_end_by_themselves() -> None:
    shelf = Shelf()
    async with split(shelf, limits=EngineLimits(handover_ttl_s=0.1)) as (prefill, _):
        await collect(prefill, request_of(range(1, 20)))
        assert shelf.stats.leases

        async def is_empty() -> bool:
            await shelf.touch()
            return shelf.stats.leases == shelf.stats.private_blocks == 0

        await assert_eventually(is_empty)


async def test_a_lost_decode_worker_is_continued_from_ticket_and_tokens() -> None:
    request = request_of(tuple(range(1, 31)), max_tokens=40, temperature=1.0, seed=4)
    expected = await alone(request)
    shelf, runner = Shelf(), FakeRunner()
    async with split(shelf, runner) as (prefill, decode):
        first = await collect(prefill, request)
        sent = expected.tokens[:11]
        resume = Resume(
            emitted=tuple(t for event in sent for t in event.ids), text_offset=sum(len(event.text) for event in sent)
        )
        rest = await collect(decode, plain(request, ticket=first.last.ticket, resume=resume, attempt=1))
        assert is_whole(rest, start=11)
        assert resume.emitted + rest.ids == expected.ids
        assert rest.last.usage.loaded_tokens == 30
        assert runner.computed == 39 + 30 - 30  # the tokens since the ticket, and those that follow


async def test_a_running_request_is_exported_and_continued_elsewhere() -> None:
    request = request_of(tuple(range(1, 31)), max_tokens=60)
    expected = await alone(request)
    shelf, other_runner = Shelf(), FakeRunner()
    async with (
        running_engine(FakeRunner(step_s=0.01), store=shelf, name="a") as one,
        anyio.create_task_group() as tg,
    ):
        sent = Answer()
        tg.start_soon(collect, one, request, sent.events.append)
        await assert_eventually(lambda: one.board.generated_tokens > 12)
        ticket = await one.export(RequestId("r1"))
        tg.cancel_scope.cancel()  # the reader leaves; `cancel` by id would end the ticket's leases as well
    async with running_engine(other_runner, store=shelf, name="b") as other:
        assert ticket.emitted == sent.ids[: len(ticket.emitted)]
        resume = Resume(emitted=sent.ids, text_offset=len(sent.text))
        rest = await collect(other, plain(request, ticket=ticket, resume=resume, attempt=1))
        assert sent.ids + rest.ids == expected.ids
        assert sent.text + rest.text == expected.text
        assert rest.last.usage.loaded_tokens == 30
        assert other_runner.computed == 30 + 59 - ticket.covered


async def test_adopted_blocks_are_hit_locally() -> None:
    request = request_of(tuple(range(1, 31)), max_tokens=4)
    shelf = Shelf()
    async with split(shelf) as (prefill, decode):
        first = await collect(prefill, request)
        ticket = first.last.ticket
        assert (await decode.adopt(AdoptRequest(tenant=TenantId("t"), ticket=ticket))).blocks == 3
        rest = await collect(decode, plain(request, ticket=ticket))
        assert rest.last.usage.cached_tokens == 24
        assert rest.last.usage.loaded_tokens == 6
        decode.check()


async def test_another_requests_tail_is_never_loaded() -> None:
    """The tail's name holds the request id: a ticket of one request is a miss for another."""
    request = request_of(tuple(range(1, 6)), max_tokens=6)
    shelf, runner = Shelf(), FakeRunner()
    async with split(shelf, runner) as (prefill, decode):
        first = await collect(prefill, request)
        other = plain(request, request_id=RequestId("other"), ticket=replace(first.last.ticket))
        rest = await collect(decode, other)
        assert rest.last.usage.loaded_tokens == 0
        assert isinstance(rest.last, Finished)
