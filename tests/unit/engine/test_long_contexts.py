"""A context longer than one worker's pool: its blocks live with others, its tokens are the reference's."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random

import anyio
import anyio.to_thread
import pytest

from covey.codec.methods import Decode
from covey.engine.borrowing import Lender
from covey.engine.engine import Engine
from covey.engine.limits import EngineLimits
from covey.errors import InvalidArgument, LeaseExpired, NoSpace
from covey.model.plan import Floats, Row, SampleSpec, StepPlan
from covey.model.runner import TorchRunner, open_runner
from covey.model.tokenizer import Tokenizer, open_tokenizer
from covey.net.memory import MemoryNetwork
from covey.net.rpc import Call, Channel, Channels, Handlers
from covey.policy.batch_limits import BatchLimits
from covey.testing import assert_eventually
from covey.types.common import Empty
from covey.types.generate import Event, Failed, Finished, GenerateRequest, Resume, Tokens
from covey.types.ids import LeaseId, TenantId, WorkerId
from covey.types.lend import AttendReply, AttendRequest, AttendRow, LendChunk, LendReply, ReturnRequest
from tests.support.engines import Answer, assert_idle, collect, is_whole, plain, request_of, running_engine
from tests.support.families import FAMILIES, write_reference
from tests.support.teacher import Teacher
from tests.support.tiny_llama import VOCAB_SIZE

pytestmark = [pytest.mark.golden, pytest.mark.timeout(120)]

BLOCK = 8
POOL = 16
OUTPUT = 24
LIMITS = EngineLimits(
    batch=BatchLimits(max_tokens=48, max_running=4, chunk_min=16),
    grace_s=0.0,
    borrow_blocks=64,
    lend_share=1.0,
    kv_timeout_s=2.0,
    loan_ttl_s=0.5,
)


@dataclass
class Model:
    teacher: Teacher
    vocabulary: Tokenizer
    folder: Path

    def runner(self, n_blocks: int = POOL) -> TorchRunner:
        cache = self.folder.parent / "cache"
        return open_runner(str(self.folder), cache_dir=cache, n_blocks=n_blocks, block_size=BLOCK)


@pytest.fixture(scope="module", params=["llama", "qwen3"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Model:
    folder = tmp_path_factory.mktemp("long") / request.param
    teacher = Teacher(write_reference(FAMILIES[request.param], folder))
    return Model(teacher, open_tokenizer(str(folder)), folder)


def long_request(length: int = 200, **changes: object) -> GenerateRequest:
    rng = Random(length)
    tokens = [rng.randrange(VOCAB_SIZE) for _ in range(length)]
    return plain(request_of(tokens, request_id=f"long{length}", max_tokens=OUTPUT), model="", **changes)


class Lenders:
    """`borrowing.Neighbours` over engines on an in-process network."""

    def __init__(self, channels: Channels) -> None:
        self._channels = channels
        self.engines: dict[str, tuple[str, Engine]] = {}

    def lenders(self) -> Sequence[Lender]:
        return [
            Lender(worker=WorkerId(name), address=address, lendable=engine.creditor.lendable)
            for name, (address, engine) in self.engines.items()
        ]

    def to(self, address: str) -> Channel:
        return self._channels.to(address)


def handlers_of(engine: Engine) -> Handlers:
    async def lend(chunks: AsyncIterator[LendChunk], _: Call) -> LendReply:
        return await engine.creditor.lend(chunks)

    async def attend(request: AttendRequest, _: Call) -> AttendReply:
        return await engine.creditor.attend(request)

    async def give_back(request: ReturnRequest, _: Call) -> Empty:
        engine.creditor.take_back(request)
        return Empty()

    return {Decode.LEND: lend, Decode.ATTEND: attend, Decode.RETURN: give_back}


@dataclass
class Site:
    """A debtor and its creditors."""

    debtor: Engine
    creditors: list[Engine]
    network: MemoryNetwork
    lenders: Lenders


@asynccontextmanager
async def site(model: Model, creditors: Sequence[int] = (64,), limits: EngineLimits = LIMITS) -> AsyncIterator[Site]:
    """`creditors` are the sizes of their pools."""
    network = MemoryNetwork()
    async with AsyncExitStack() as stack:
        channels = await stack.enter_async_context(network.channels())
        lenders = Lenders(channels)
        found = []
        for index, n_blocks in enumerate(creditors):
            engine = await stack.enter_async_context(
                running_engine(
                    await anyio.to_thread.run_sync(model.runner, n_blocks),
                    vocabulary=model.vocabulary,
                    limits=limits,
                    name=f"c{index}",
                )
            )
            server = await stack.enter_async_context(network.serve("127.0.0.1:0", handlers_of(engine), grace_s=0.0))
            lenders.engines[f"c{index}"] = (server.address, engine)
            found.append(engine)
        debtor = await stack.enter_async_context(
            running_engine(
                await anyio.to_thread.run_sync(model.runner),
                vocabulary=model.vocabulary,
                limits=limits,
                name="d",
                neighbours=lenders,
            )
        )
        yield Site(debtor, found, network, lenders)


def judged(model: Model, request: GenerateRequest, answer: Answer) -> None:
    assert isinstance(answer.last, Finished), answer.last
    assert is_whole(answer)
    assert len(answer.ids) == OUTPUT
    tally = model.teacher.judge(request.token_ids, answer.ids)
    assert tally.wrong == 0, tally


@pytest.mark.parametrize("creditors", [(64,), (12, 10, 9)], ids=["one", "three"])
async def test_a_context_longer_than_the_pool(model: Model, creditors: tuple[int, ...]) -> None:
    request = long_request()
    assert len(request.token_ids) > POOL * BLOCK
    async with site(model, creditors) as here:
        answer = await collect(here.debtor, request)
        judged(model, request, answer)
        assert sum(engine.creditor.attended for engine in here.creditors) > OUTPUT
        assert all(engine.creditor.attended for engine in here.creditors)
        await assert_eventually(lambda: all(engine.creditor.lent == 0 for engine in here.creditors))
        await assert_idle(here.debtor)


async def test_others_run_beside_it(model: Model) -> None:
    long, short = long_request(), long_request(40)
    async with site(model) as here:
        answers: dict[str, Answer] = {}

        async def ask(engine: Engine, request: GenerateRequest, name: str) -> None:
            answers[name] = await collect(engine, request)

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(ask, here.debtor, long, "long")
            tasks.start_soon(ask, here.debtor, short, "short")
            tasks.start_soon(ask, here.creditors[0], short, "at the creditor")
        judged(model, long, answers["long"])
        judged(model, short, answers["short"])
        judged(model, short, answers["at the creditor"])
        await assert_idle(here.debtor)


async def test_nobody_to_lend_is_overload_and_off_is_a_context_too_long(model: Model) -> None:
    async with site(model, (10,)) as here:
        answer = await collect(here.debtor, long_request())
        assert isinstance(answer.last, Failed)
        assert (answer.last.code, answer.last.retryable) == ("OVERLOADED", True)
        await assert_eventually(lambda: here.creditors[0].creditor.lent == 0)
        await assert_idle(here.debtor)
    async with site(model, limits=replace(LIMITS, borrow_blocks=0)) as here:
        assert here.debtor.info().context_limit == POOL * BLOCK
        answer = await collect(here.debtor, long_request())
        assert answer.last.code == "CONTEXT_LENGTH_EXCEEDED"


async def test_a_creditor_that_goes_away_ends_the_request_for_another_attempt(model: Model) -> None:
    request = long_request()
    async with site(model, (64,)) as here:
        (address, _), seen = here.lenders.engines["c0"], []

        def watch(event: object) -> None:
            seen.append(event)
            if len(seen) == 12:
                here.network.disconnect(address)

        answer = await collect(here.debtor, request, watch)
        assert isinstance(answer.last, Failed)
        assert (answer.last.code, answer.last.retryable) == ("UNAVAILABLE", True)
        assert model.teacher.judge(request.token_ids, answer.ids).wrong == 0 or not answer.ids
        await assert_idle(here.debtor)
        await assert_eventually(lambda: here.creditors[0].creditor.lent == 0)  # its lease ran out


async def test_a_cancelled_debtor_gives_back_and_a_dead_one_is_outlived(model: Model) -> None:
    async with site(model) as here:
        creditor = here.creditors[0].creditor
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(collect, here.debtor, long_request())
            await assert_eventually(lambda: creditor.attended > 8, every_s=0.001)
            await here.debtor.cancel(long_request().request_id)
        await assert_eventually(lambda: creditor.lent == 0, timeout_s=0.4)
        lease = await creditor_lends(here)
        assert creditor.lent == 1
        await assert_eventually(lambda: creditor.lent == 0, timeout_s=3)
        with pytest.raises(LeaseExpired):
            await creditor.attend(query(lease))


async def test_bad_input_is_refused_and_leaves_nothing(model: Model) -> None:
    async with site(model) as here:
        creditor = here.creditors[0].creditor
        good = chunk_of(here)
        for chunks, error in (
            ([replace(good, blocks=1000)], NoSpace),
            ([], InvalidArgument),
            ([replace(good, data=good.data[:-1])], InvalidArgument),
            ([replace(good, index=1)], InvalidArgument),
            ([replace(good, offset=4)], InvalidArgument),
            ([replace(good, data=good.data + b"x")], InvalidArgument),
            ([good, good], InvalidArgument),
            ([replace(good, blocks=2), replace(good, blocks=2, index=1, tenant=TenantId("x"))], InvalidArgument),
        ):
            with pytest.raises(error):
                await creditor.lend(stream(chunks))
            assert creditor.lent == 0
        lease = await creditor_lends(here)
        heads, width = (await anyio.to_thread.run_sync(model.runner, 2)).query_shape
        q = bytes(4 * heads * width)
        (part,) = (await creditor.attend(query(lease, q=q, tokens=1))).parts
        assert (len(part.out), len(part.lse)) == (4 * heads * width, 4 * heads)
        for request, wrong in (
            (query(lease, tenant="x"), LeaseExpired),
            (query(LeaseId("guess")), LeaseExpired),
            (query(lease, q=q[1:], tokens=1), InvalidArgument),
            (query(lease, q=q, tokens=2), InvalidArgument),
            (query(lease, q=q, tokens=1, layer=99), InvalidArgument),
        ):
            with pytest.raises(wrong):
                await creditor.attend(request)
        creditor.take_back(ReturnRequest(tenant=TenantId("x"), lease=lease))
        assert creditor.lent == 1
        creditor.take_back(ReturnRequest(tenant=TenantId("t"), lease=lease))
        assert creditor.lent == 0


def chunk_of(here: Site) -> LendChunk:
    """One whole block."""
    data = bytes(here.debtor.info().block_bytes)
    return LendChunk(tenant=TenantId("t"), owner="test", blocks=1, index=0, offset=0, data=data)


async def stream(chunks: Sequence[LendChunk]) -> AsyncIterator[LendChunk]:
    for chunk in chunks:
        yield chunk


async def creditor_lends(here: Site) -> LeaseId:
    return (await here.creditors[0].creditor.lend(stream([chunk_of(here)]))).lease


def query(lease: LeaseId, *, tenant: str = "t", q: bytes = b"", tokens: int = 0, layer: int = 0) -> AttendRequest:
    return AttendRequest(layer=layer, rows=(AttendRow(tenant=TenantId(tenant), lease=lease, tokens=tokens, q=q),))


def test_rows_of_a_runner_with_keys_elsewhere_draw_what_one_runner_draws(model: Model) -> None:
    """The runner function alone: any split of the blocks over runners, chunks and single tokens."""
    whole, here, *others = (model.runner(32) for _ in range(4))
    rng = Random(3)
    tokens = tuple(rng.randrange(VOCAB_SIZE) for _ in range(150))
    table = tuple(range(32))
    whole.step(StepPlan(rows=(Row(seq=1, tokens=tokens[:140], start=0, blocks=table),)))
    counts = (7, 4)

    class Elsewhere:
        tokens = BLOCK * sum(counts)

        def attend(self, layer: int, q: Floats) -> list[tuple[Floats, Floats]]:
            return [o.attend(layer, tuple(range(n)), q) for o, n in zip(others, counts, strict=True)]

    at = 0
    for runner, count in (*zip(others, counts, strict=True), (here, 18 - sum(counts))):
        for index in range(count):
            with whole.block_view(at + index) as source, runner.block_view(index) as target:
                target[:] = source
        at += count
    for start, end in ((140, 149), (149, 150)):
        sample = SampleSpec(position=end, logprobs=5)
        plain_row = Row(seq=1, tokens=tokens[start:end], start=start, blocks=table, sample=sample)
        (expected,) = whole.step(StepPlan(rows=(plain_row,))).sampled
        (found,) = here.step(StepPlan(rows=(replace(plain_row, elsewhere=Elsewhere()),))).sampled
        assert found.draws[0].token == expected.draws[0].token
        for (token, value), (expected_token, expected_value) in zip(
            found.draws[0].top, expected.draws[0].top, strict=True
        ):
            assert token == expected_token
            assert value == pytest.approx(expected_value, abs=1e-4)


async def test_after_a_loss_another_worker_goes_on_with_other_creditors(model: Model) -> None:
    """As the gateway does: the same request, with what the client has; a creditor that is gone may still be listed."""
    request = long_request()
    async with site(model, (64, 64)) as here:
        address, _ = here.lenders.engines["c0"]
        emitted: list[int] = []

        def watch(event: Event) -> None:
            emitted.extend(event.ids if isinstance(event, Tokens) else ())
            if len(emitted) == 5:
                here.network.disconnect(address)

        first = await collect(here.debtor, request, watch)
        assert (first.last.code, first.last.retryable) == ("UNAVAILABLE", True)
        text_offset = sum(len(event.text) for event in first.tokens)
        again = plain(request, attempt=1, resume=Resume(emitted=first.ids, text_offset=text_offset))
        rest = await collect(here.debtor, again)
        assert isinstance(rest.last, Finished), rest.last
        assert here.creditors[1].creditor.attended > 0
        tally = model.teacher.judge(request.token_ids, first.ids + rest.ids)
        assert tally.wrong == 0
        assert len(first.ids + rest.ids) == OUTPUT
