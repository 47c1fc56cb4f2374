"""Answers under a grammar: valid, ended, batched with free ones, continued by another worker, refused when wrong."""

from __future__ import annotations

import json
import re
import threading
from typing import Any

import anyio
import pytest

from covey.engine.fake import FakeRunner
from covey.model.grammar import GrammarCompiler
from covey.model.text_stream import TextStream
from covey.types.generate import Event, Failed, Finished, FinishReason, Progress, Resume, Role
from covey.types.grammar import Grammar, GrammarKind
from tests.support.engines import assert_idle, collect, is_whole, request_of, running_engine

K = GrammarKind
PERSON: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 6},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 2},
    },
    "required": ["name", "age"],
}


class ByteVocabulary:
    """Token `i + 1` is the byte `i`; 0 ends the text."""

    def token_bytes(self, token: int) -> bytes:
        return bytes([token - 1]) if 0 < token <= 256 else b""

    def text_stream(self) -> TextStream:
        return TextStream(self.token_bytes)


def engine_of(**options: Any) -> Any:
    return running_engine(FakeRunner(vocab_size=300, n_blocks=128), vocabulary=ByteVocabulary(), **options)


def constrained(kind: GrammarKind, body: Any, seed: int = 0, **fields: Any) -> Any:
    fields = {"max_tokens": 200, "temperature": 1.0, "ignore_eos": False} | fields
    grammar = Grammar(kind=kind, body=body).write()
    return request_of([5, 6, 7, seed % 200], request_id=f"r{seed}", seed=seed, grammar=grammar, **fields)


@pytest.mark.parametrize(
    ("kind", "body", "pattern"),
    [
        (K.REGEX, "[a-c]{2}-[0-9]{3}", r"[a-c]{2}-[0-9]{3}"),
        (K.EBNF, 'root ::= "<" [a-f] [a-f] ">"', r"<[a-f]{2}>"),
        (K.JSON_SCHEMA, {"enum": ["red", "green"]}, r'"(red|green)"'),
        (
            K.STRUCTURAL_TAG,
            {
                "type": "structural_tag",
                "format": {
                    "type": "tag",
                    "begin": "<call>",
                    "content": {"type": "json_schema", "json_schema": {"type": "boolean"}},
                    "end": "</call>",
                },
            },
            r"<call>(true|false)</call>",
        ),
    ],
    ids=lambda value: value.value if isinstance(value, GrammarKind) else "",
)
async def test_an_answer_follows_its_grammar_and_stops_by_itself(kind: GrammarKind, body: Any, pattern: str) -> None:
    async with engine_of() as engine:
        for seed in range(5):
            answer = await collect(engine, constrained(kind, body, seed))
            assert isinstance(answer.last, Finished), answer.last
            assert answer.last.reason is FinishReason.STOP
            assert re.fullmatch(pattern, answer.text), answer.text
            assert is_whole(answer)
        await assert_idle(engine, pinned=None)


async def test_constrained_and_free_requests_share_batches_and_change_nothing_for_each_other() -> None:
    def requests() -> list[Any]:
        free = [request_of([9, 8, i], request_id=f"free{i}", max_tokens=20, temperature=1.0, seed=i) for i in range(4)]
        return free + [constrained(K.JSON_SCHEMA, PERSON, seed) for seed in range(8)]

    async with engine_of() as engine:
        alone = [(await collect(engine, request)).ids for request in requests()]
    together: dict[str, tuple[int, ...]] = {}

    async with engine_of() as engine:

        async def ask(request: Any) -> None:
            together[request.request_id] = (await collect(engine, request)).ids

        async with anyio.create_task_group() as tasks:
            for request in requests():
                tasks.start_soon(ask, request)
    assert [together[request.request_id] for request in requests()] == alone
    for ids in alone[4:]:
        value = json.loads(bytes(token - 1 for token in ids if token))
        assert value.keys() <= PERSON["properties"].keys()
        assert 0 <= value["age"] <= 120


@pytest.mark.parametrize("cut", [0, 1, 5, 10_000])
async def test_a_constrained_answer_goes_on_at_another_worker(cut: int) -> None:
    request = constrained(K.JSON_SCHEMA, PERSON, 3)
    async with engine_of() as engine:
        whole = await collect(engine, request)
    emitted = whole.ids[:cut]
    text = bytes(token - 1 for token in emitted).decode(errors="replace") if cut < 10 else whole.text
    resumed = request_of(
        request.token_ids,
        max_tokens=200,
        temperature=1.0,
        seed=3,
        ignore_eos=False,
        grammar=request.grammar,
        resume=Resume(emitted=emitted, text_offset=len(text)),
    )
    async with engine_of() as engine:
        rest = await collect(engine, resumed)
    assert emitted + rest.ids == whole.ids
    assert rest.last.reason is FinishReason.STOP


async def test_prefill_draws_the_first_token_under_the_grammar() -> None:
    async with engine_of(role=Role.PREFILL, name="p1") as engine:
        answer = await collect(engine, constrained(K.JSON_SCHEMA, PERSON, 1))
    assert answer.text == "{"
    assert answer.last.ticket.emitted == answer.ids


async def test_what_was_emitted_must_follow_the_grammar() -> None:
    request = constrained(K.REGEX, "ab+", 1, resume=Resume(emitted=(ord("x") + 1,), text_offset=1))
    async with engine_of() as engine:
        answer = await collect(engine, request)
    assert isinstance(answer.last, Failed)
    assert (answer.last.code, answer.last.field) == ("INVALID_ARGUMENT", "resume.emitted")


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("{", "JSON"),
        ('{"yaml": true}', "one member"),
        ('{"regex": "(a"}', "parenthesis"),
        ('{"json_schema": {"type": "banana"}}', "banana"),
        ('{"json_schema": {"not": {}}}', "not"),
        ('{"ebnf": "a ::= \\"b\\""}', "root"),
    ],
)
async def test_a_wrong_grammar_is_refused_by_name(text: str, word: str) -> None:
    async with engine_of() as engine:
        answer = await collect(engine, request_of([1, 2], grammar=text))
        assert isinstance(answer.last, Failed)
        assert answer.last.code == "INVALID_ARGUMENT"
        assert answer.last.field.startswith("grammar")
        assert word in answer.last.message + answer.last.field


async def test_a_whole_json_text_at_the_last_token_is_a_stop_and_a_cut_one_a_length() -> None:
    async with engine_of() as engine:
        whole = await collect(engine, constrained(K.JSON_SCHEMA, {"const": "ab"}, max_tokens=4))
        cut = await collect(engine, constrained(K.JSON_SCHEMA, {"const": "ab"}, 1, max_tokens=3))
    assert (whole.text, whole.last.reason) == ('"ab"', FinishReason.STOP)
    assert (cut.text, cut.last.reason) == ('"ab', FinishReason.LENGTH)


async def test_the_end_of_text_ends_a_constrained_answer_whatever_else_was_asked() -> None:
    async with engine_of() as engine:
        for seed in range(4):
            request = constrained(K.REGEX, "a{3,8}", seed, ignore_eos=True, min_tokens=50)
            answer = await collect(engine, request)
            assert answer.last.reason is FinishReason.STOP
            assert re.fullmatch("a{3,8}", answer.text)


async def test_a_dead_end_fails_its_request_only() -> None:
    class Letters(ByteVocabulary):
        def token_bytes(self, token: int) -> bytes:
            return super().token_bytes(token) if token != ord("z") + 1 else b""

    runner = FakeRunner(vocab_size=300, n_blocks=128)
    async with running_engine(runner, vocabulary=Letters()) as engine:
        stuck = await collect(engine, constrained(K.REGEX, "abz"))
        fine = await collect(engine, constrained(K.REGEX, "aby", 1))
        await assert_idle(engine, pinned=None)
    assert isinstance(stuck.last, Failed)
    assert (stuck.last.code, stuck.text) == ("FAILED_PRECONDITION", "ab")
    assert fine.text == "aby"


async def test_a_stream_shows_life_while_its_grammar_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    released = threading.Event()
    compile_ = GrammarCompiler.compile

    def slow(self: GrammarCompiler, text: str) -> Any:
        assert released.wait(30)
        return compile_(self, text)

    def release(event: Event) -> None:
        if isinstance(event, Progress):
            released.set()

    monkeypatch.setattr(GrammarCompiler, "compile", slow)
    async with engine_of() as engine:
        answer = await collect(engine, constrained(K.REGEX, "abc"), on_event=release)
    assert isinstance(answer.events[0], Progress)
    assert answer.text == "abc"
