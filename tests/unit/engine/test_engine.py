"""One engine over a fake runner: streams, endings, bounds."""

from __future__ import annotations

from contextlib import aclosing
from typing import Any

import anyio
import pytest

from covey import failpoint
from covey.engine.engine import Engine
from covey.engine.fake import FakeRunner, FakeVocabulary
from covey.engine.limits import EngineLimits
from covey.policy.batch_limits import BatchLimits
from covey.testing import assert_eventually
from covey.types.generate import (
    Accepted,
    Failed,
    Finished,
    FinishReason,
    KvScope,
    Progress,
    Refused,
    Resume,
    Stage,
    Tokens,
)
from covey.types.ids import NamespaceId, RequestId
from tests.support.engines import assert_idle, collect, is_cancelled, is_whole, plain, request_of, running_engine

PROMPT = tuple(range(1, 30))


async def test_a_stream_is_contiguous_and_ends_once() -> None:
    async with running_engine() as engine:
        answer = await collect(engine, request_of(PROMPT, max_tokens=20))
        assert isinstance(answer.events[0], Accepted)
        assert is_whole(answer)
        assert len(answer.ids) == 20
        assert answer.last.reason is FinishReason.LENGTH
        assert answer.last.usage.prompt_tokens == 29
        assert answer.last.usage.completion_tokens == 20
        vocabulary = FakeVocabulary()
        assert answer.text == b"".join(map(vocabulary.token_bytes, answer.ids)).decode(errors="replace")


async def test_tokens_do_not_depend_on_the_batch_or_the_cache() -> None:
    prompts = [PROMPT, PROMPT[:9], (7, *PROMPT), tuple(range(50, 120))]
    async with running_engine() as engine:
        alone = [await collect(engine, request_of(p, request_id=f"a{i}")) for i, p in enumerate(prompts)]
    runner = FakeRunner()
    async with running_engine(runner) as engine:
        together: dict[int, tuple[int, ...]] = {}

        async def ask(index: int, tokens: tuple[int, ...]) -> None:
            together[index] = (await collect(engine, request_of(tokens, request_id=f"b{index}"))).ids

        for _ in range(2):
            async with anyio.create_task_group() as tg:
                for index, tokens in enumerate(prompts):
                    tg.start_soon(ask, index, tokens)
            assert together == {i: answer.ids for i, answer in enumerate(alone)}
        first = runner.computed
        again = await collect(engine, request_of(PROMPT, request_id="again"))
        assert again.ids == alone[0].ids
        assert again.last.usage.cached_tokens == 24
        assert runner.computed - first == 29 - 24 + 11


async def test_seeded_sampling_depends_on_seed_and_position_only() -> None:
    async with running_engine() as engine:
        one = await collect(engine, request_of(PROMPT, request_id="1", temperature=1.0, seed=5))
        two = await collect(engine, request_of(PROMPT, request_id="2", temperature=1.0, seed=5))
        other = await collect(engine, request_of(PROMPT, request_id="3", temperature=1.0, seed=6))
        assert one.ids == two.ids != other.ids


@pytest.mark.parametrize("penalty", [0.0, 0.5])
async def test_a_resumed_stream_equals_the_undisturbed_one(penalty: float) -> None:
    fields: dict[str, Any] = {"temperature": 0.7, "seed": 3, "max_tokens": 24, "presence_penalty": penalty}
    async with running_engine() as engine:
        whole = await collect(engine, request_of(PROMPT, **fields))
    for cut in (1, 5, 12, 23):
        sent = whole.tokens[:cut]
        text = "".join(event.text for event in sent)
        ids = tuple(token for event in sent for token in event.ids)
        resume = Resume(emitted=ids, text_offset=len(text))
        async with running_engine() as engine:
            rest = await collect(engine, request_of(PROMPT, resume=resume, attempt=1, **fields))
        assert is_whole(rest, start=cut)
        assert ids + rest.ids == whole.ids
        assert text + rest.text == whole.text
        assert rest.tokens[0].text_offset == len(text)
        assert rest.last.usage.completion_tokens == 24


async def test_a_finished_answer_resumes_to_its_end_at_once() -> None:
    runner = FakeRunner()
    async with running_engine(runner) as engine:
        resume = Resume(emitted=(5, 6), text_offset=0)
        answer = await collect(engine, request_of(PROMPT, max_tokens=2, resume=resume))
        assert answer.last.reason is FinishReason.LENGTH
        assert answer.text == "fg "
        assert runner.steps == 0


async def test_stop_strings_are_withheld_across_tokens() -> None:
    async with running_engine() as engine:
        whole = await collect(engine, request_of(PROMPT, max_tokens=40))
        stop = whole.text[10:16]
        cut = whole.text.index(stop)
        answer = await collect(engine, request_of(PROMPT, request_id="r2", max_tokens=40, stop=(stop,)))
        assert answer.text == whole.text[:cut]
        assert answer.last.reason is FinishReason.STOP
        assert is_whole(answer)
        assert answer.ids == whole.ids[: len(answer.ids)]
        assert len(answer.ids) < 40


async def test_end_of_text_ends_and_min_tokens_delays_it() -> None:
    runner = FakeRunner(vocab_size=8)
    prompt = (1, 2, 3, 4, 5)
    async with running_engine(runner) as engine:
        answer = await collect(engine, request_of(prompt, max_tokens=200, ignore_eos=False))
        assert answer.last.reason is FinishReason.STOP
        assert answer.ids[-1] == 0
        assert 0 not in answer.ids[:-1]
        count = len(answer.ids)
        longer = await collect(
            engine, request_of(prompt, request_id="2", max_tokens=200, ignore_eos=False, min_tokens=count + 3)
        )
        assert len(longer.ids) > count + 2
        assert 0 not in longer.ids[: count + 3]


async def test_logprobs_carry_the_exact_bytes() -> None:
    async with running_engine() as engine:
        answer = await collect(engine, request_of(PROMPT, max_tokens=3, logprobs=2))
        for event in answer.tokens:
            (chosen,) = event.logprobs
            assert chosen.id == event.ids[0]
            assert chosen.token == FakeVocabulary().token_bytes(chosen.id)
            assert len(chosen.top) == 2


@pytest.mark.parametrize(
    ("changes", "code", "field"),
    [
        ({"token_ids": ()}, "INVALID_ARGUMENT", "token_ids"),
        ({"token_ids": (1,) * 256}, "CONTEXT_LENGTH_EXCEEDED", "token_ids"),
        ({"token_ids": (1, 999)}, "INVALID_ARGUMENT", "token_ids"),
        ({"model": "other"}, "INVALID_ARGUMENT", "model"),
        ({"grammar": "{}"}, "INVALID_ARGUMENT", "grammar"),
        ({"scopes": ()}, "INVALID_ARGUMENT", "scopes"),
        ({"resume": Resume(emitted=(1,) * 240)}, "CONTEXT_LENGTH_EXCEEDED", "resume.emitted"),
    ],
)
async def test_bad_requests_fail_by_field_and_start_nothing(changes: dict[str, Any], code: str, field: str) -> None:
    runner = FakeRunner()
    async with running_engine(runner) as engine:
        answer = await collect(engine, plain(request_of(PROMPT), **changes))
        assert isinstance(answer.last, Failed)
        assert (answer.last.code, answer.last.field) == (code, field)
        assert runner.steps == 0
        await assert_idle(engine)


async def test_output_is_cut_at_the_context() -> None:
    async with running_engine(FakeRunner(context_limit=64)) as engine:
        answer = await collect(engine, request_of((3,) * 60, max_tokens=100))
        assert len(answer.ids) == 4
        assert answer.last.reason is FinishReason.LENGTH


async def test_two_scopes_share_the_public_prefix_only() -> None:
    public = KvScope(namespace=NamespaceId(b"p" * 16), chain_root=b"public", blocks=2)
    runner = FakeRunner()
    async with running_engine(runner) as engine:
        answers = []
        for tenant in (b"one", b"two"):
            own = KvScope(namespace=NamespaceId(tenant.ljust(16)), chain_root=b"root" + tenant)
            request = plain(request_of(tuple(range(1, 40)), request_id=tenant.decode()), scopes=(public, own))
            answers.append(await collect(engine, request))
        assert answers[0].ids == answers[1].ids
        assert answers[1].last.usage.cached_tokens == 16


async def test_the_deadline_ends_running_and_queued_requests() -> None:
    limits = EngineLimits(batch=BatchLimits(max_running=1, max_tokens=64))
    async with running_engine(FakeRunner(step_s=0.02), limits=limits) as engine:
        answers = {}

        async def ask(name: str) -> None:
            request = request_of(PROMPT, request_id=name, max_tokens=200, deadline_s=0.2)
            answers[name] = await collect(engine, request)

        async with anyio.create_task_group() as tg:
            tg.start_soon(ask, "running")
            tg.start_soon(ask, "queued")
        assert {a.last.code for a in answers.values()} == {"DEADLINE_EXCEEDED"}
        assert not answers["queued"].ids
        await assert_idle(engine)


async def test_a_full_queue_refuses_with_a_hint() -> None:
    limits = EngineLimits(batch=BatchLimits(max_running=1, max_tokens=64, queue_max=1))
    async with running_engine(FakeRunner(step_s=0.02), limits=limits) as engine, anyio.create_task_group() as tg:
        for index in range(2):
            request = request_of(PROMPT, request_id=str(index), max_tokens=200)
            tg.start_soon(collect, engine, request)
            await assert_eventually(lambda: engine.load().running + engine.load().waiting == index + 1)  # noqa: B023
        refused = await collect(engine, request_of(PROMPT, request_id="over"))
        assert isinstance(refused.last, Refused)
        assert refused.last.code == "OVERLOADED"
        assert refused.last.retry_after_ms > 0
        tg.cancel_scope.cancel()


async def test_requests_wait_for_blocks_and_never_overcommit() -> None:
    runner = FakeRunner(n_blocks=12, context_limit=96)
    async with running_engine(runner) as engine:
        answers = []

        async def ask(index: int) -> None:
            request = request_of(tuple(range(index + 1, index + 30)), request_id=str(index), max_tokens=30)
            answers.append(await collect(engine, request))

        async with anyio.create_task_group() as tg:
            for index in range(6):
                tg.start_soon(ask, index)
        assert all(len(answer.ids) == 30 for answer in answers)
        await assert_idle(engine)


async def test_a_silent_stream_shows_progress() -> None:
    limits = EngineLimits(batch=BatchLimits(max_running=1, max_tokens=64), progress_s=0.05)
    async with running_engine(FakeRunner(step_s=0.12), limits=limits) as engine:
        answer = await collect(engine, request_of(tuple(range(1, 200)), max_tokens=1))
        stages = {event.stage for event in answer.events if isinstance(event, Progress)}
        assert Stage.PREFILL in stages


@pytest.mark.parametrize("point", ["engine.step", "engine.after_step"])
async def test_a_stuck_step_falls_silent(point: str) -> None:
    failpoint.arm(f"{point}=sleep(0.6)@1")
    limits = EngineLimits(progress_s=0.05, step_stall_s=0.2)
    async with running_engine(limits=limits) as engine:
        answer = await collect(engine, request_of(PROMPT, max_tokens=2))
        assert len(answer.ids) == 2
        assert 1 <= sum(isinstance(event, Progress) for event in answer.events) <= 6


async def test_a_slow_reader_is_paused_and_resumes() -> None:
    limits = EngineLimits(outbox_tokens=4)
    async with running_engine(limits=limits) as engine:
        undisturbed = await collect(engine, request_of(PROMPT, request_id="0", max_tokens=40))
        runner_steps = engine.board.generated_tokens
        async with aclosing(engine.generate(request_of(PROMPT, request_id="1", max_tokens=40))) as events:
            await anext(events)
            await assert_eventually(lambda: engine.board.generated_tokens >= runner_steps + 4)
            with anyio.fail_after(5):
                await collect(engine, request_of(PROMPT, request_id="2", max_tokens=20))
            assert engine.board.generated_tokens == runner_steps + 4 + 20  # the paused one did not move
            ids = [token async for event in events if isinstance(event, Tokens) for token in event.ids]
        assert tuple(ids) == undisturbed.ids


async def test_a_reader_that_stalls_for_good_fails() -> None:
    limits = EngineLimits(outbox_tokens=4, reader_stall_s=0.1)
    async with running_engine(limits=limits) as engine:
        async with aclosing(engine.generate(request_of(PROMPT, max_tokens=100))) as events:
            await anext(events)
            await assert_idle(engine)
            rest = [event async for event in events]
        assert isinstance(rest[-1], Failed)
        assert len(rest) == 5


async def test_duplicates_run_once_and_a_newer_attempt_takes_over() -> None:
    async with running_engine(FakeRunner(step_s=0.01)) as engine:
        answers = {}

        async def ask(name: str, attempt: int) -> None:
            answers[name] = await collect(engine, request_of(PROMPT, max_tokens=60, attempt=attempt))

        async with anyio.create_task_group() as tg:
            tg.start_soon(ask, "first", 1)
            await assert_eventually(lambda: engine.load().running == 1)
            tg.start_soon(ask, "same", 1)
            await assert_eventually(lambda: "same" in answers)
            tg.start_soon(ask, "newer", 2)
        assert answers["same"].last.code == "ALREADY_EXISTS"
        assert is_cancelled(answers["first"])
        assert len(answers["newer"].ids) == 60
        await assert_idle(engine)


async def test_cancel_by_id_ends_the_stream_well() -> None:
    async with running_engine(FakeRunner(step_s=0.01)) as engine, anyio.create_task_group() as tg:
        answers = []

        async def ask() -> None:
            answers.append(await collect(engine, request_of(PROMPT, max_tokens=200)))

        tg.start_soon(ask)
        await assert_eventually(lambda: engine.board.generated_tokens > 3)
        await engine.cancel(RequestId("r1"))
        await engine.cancel(RequestId("unknown"))
        await assert_eventually(lambda: answers)
        assert is_cancelled(answers[0])
        await assert_idle(engine)


async def test_draining_refuses_and_waits() -> None:
    async with running_engine(FakeRunner(step_s=0.005)) as engine, anyio.create_task_group() as tg:
        answers = []

        async def ask(name: str) -> None:
            answers.append(await collect(engine, request_of(PROMPT, request_id=name, max_tokens=30)))

        tg.start_soon(ask, "before")
        await assert_eventually(lambda: engine.board.generated_tokens > 1)
        await engine.drain(timeout_s=10)
        assert engine.load().running == 0
        await ask("after")
        assert {type(answer.last) for answer in answers} == {Finished, Refused}


async def test_leaving_lets_running_requests_end() -> None:
    answers = []

    async def ask(engine: Engine) -> None:
        answers.append(await collect(engine, request_of(PROMPT, max_tokens=30)))

    async with anyio.create_task_group() as tg, running_engine(FakeRunner(step_s=0.005)) as engine:
        tg.start_soon(ask, engine)
        await assert_eventually(lambda: engine.board.generated_tokens > 1)
    assert len(answers[0].ids) == 30


async def test_streams_that_outlast_the_grace_fail_retryable() -> None:
    answers = []

    async def ask(engine: Engine) -> None:
        answers.append(await collect(engine, request_of(PROMPT, max_tokens=200)))

    async with anyio.create_task_group() as tg, running_engine(FakeRunner(step_s=0.02), grace_s=0.1) as engine:
        tg.start_soon(ask, engine)
        await assert_eventually(lambda: engine.board.generated_tokens > 1)
    assert isinstance(answers[0].last, Failed)
    assert (answers[0].last.code, answers[0].last.retryable) == ("UNAVAILABLE", True)
    assert is_whole(answers[0])
