"""Grammars alone: bounded cache, masks that are exact, what xgrammar reads loosely, hostile patterns."""

from __future__ import annotations

import json
import re
from random import Random
from typing import Any

import jsonschema
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from covey.clock import MonotonicClock
from covey.errors import FailedPrecondition, InvalidArgument, Overloaded
from covey.model import grammar as module
from covey.model.grammar import CompiledGrammar, GrammarCompiler, GrammarState
from covey.model.mask_thread import STUCK_MAX
from covey.model.plan import TokenMask
from covey.model.tokenizer import open_tokenizer
from covey.types.grammar import Grammar, GrammarKind, read_grammar

K = GrammarKind
VOCAB, EOS = 259, 257


class Bytes:
    def token_bytes(self, token: int) -> bytes:
        return bytes([token]) if token < 256 else b""


@pytest.fixture(scope="module")
def compiler() -> Any:
    compiler = GrammarCompiler(Bytes(), vocab_size=VOCAB, eos_ids=(EOS,))
    yield compiler
    compiler.close()


def schema(body: Any) -> str:
    return Grammar(kind=K.JSON_SCHEMA, body=body).write()


def allowed(mask: TokenMask) -> list[int]:
    found: list[int] = np.flatnonzero(np.unpackbits(mask.words().view(np.uint8), bitorder="little")).tolist()
    return found


def walk(compiled: CompiledGrammar, seed: int, limit: int = 3000) -> bytes:
    """A random text of the grammar."""
    state, rng, text = compiled.start(), Random(seed), b""
    for _ in range(limit):
        token = rng.choice(allowed(state.mask()))
        state.advance(token)
        text += bytes([token]) if token < 256 else b""
        if state.is_over:
            return text
    raise AssertionError(f"no end: {text!r}")


SCHEMAS = st.recursive(
    st.one_of(
        st.builds(
            lambda low, more: {"type": "string", "minLength": low, "maxLength": low + more},
            st.integers(0, 4),
            st.integers(0, 200),
        ),
        st.just({"type": "string", "pattern": "^[a-c]{1,4}$"}),
        st.builds(
            lambda low, more: {"type": "integer", "minimum": low, "maximum": low + more},
            st.integers(-50, 50),
            st.integers(0, 99),
        ),
        st.just({"type": "boolean"}),
        st.just({"type": "null"}),
        st.just({"enum": ["a", 1, None, 'quo"te', "new\nline"]}),
        st.just({"const": {"a": [1, 2]}}),
    ),
    lambda inner: st.one_of(
        st.builds(
            lambda members, needed: {
                "type": "object",
                "properties": members,
                "required": sorted(members)[:needed],
                "additionalProperties": False,
            },
            st.dictionaries(st.sampled_from(["a", "b", "c d", "é"]), inner, max_size=3),
            st.integers(0, 3),
        ),
        st.builds(lambda items, n: {"type": "array", "items": items, "maxItems": n}, inner, st.integers(0, 3)),
        st.builds(lambda one, two: {"anyOf": [one, two]}, inner, inner),
    ),
    max_leaves=6,
)


@given(SCHEMAS, st.integers(0, 2**16))
@settings(max_examples=60)
def test_any_text_of_a_schema_is_json_that_obeys_it(compiler: GrammarCompiler, body: Any, seed: int) -> None:
    text = walk(compiler.compile(schema(body)), seed)
    value = json.loads(text.decode())
    jsonschema.validate(value, body)


@pytest.mark.parametrize("low", [0, 3])
@pytest.mark.parametrize("high", [5, 120, 150])
def test_a_bounded_string_has_no_control_characters_and_is_utf8(compiler: GrammarCompiler, low: int, high: int) -> None:
    compiled = compiler.compile(schema({"type": "string", "minLength": low, "maxLength": high}))
    for seed in range(200):
        assert low <= len(json.loads(walk(compiled, seed).decode())) <= high


def test_a_json_object_is_an_object(compiler: GrammarCompiler) -> None:
    state = compiler.compile('{"json_object": true}').start()
    assert allowed(state.mask()) == [ord("{")]


def test_a_mask_names_just_what_may_follow(compiler: GrammarCompiler) -> None:
    state = compiler.compile('{"regex": "ab?"}').start()
    assert allowed(state.mask()) == [ord("a")]
    state.advance(ord("a"))
    assert allowed(state.mask()) == [ord("b"), EOS]
    assert allowed(state.mask(may_end=False)) == [ord("b")]
    state.advance(ord("b"))
    assert allowed(state.mask()) == allowed(state.mask(may_end=False)) == [EOS]
    state.advance(EOS)
    assert state.is_over
    with pytest.raises(FailedPrecondition):
        state.advance(EOS)


def test_what_was_emitted_is_followed_again(compiler: GrammarCompiler) -> None:
    compiled = compiler.compile('{"regex": "[a-z]+!"}')
    assert allowed(compiled.start(b"abc!").mask()) == [EOS]
    with pytest.raises(InvalidArgument) as refused:
        compiled.start(b"ab1")
    assert refused.value.field == "resume.emitted"


def test_the_cache_is_bounded_by_entries_and_by_bytes() -> None:
    few = GrammarCompiler(Bytes(), vocab_size=VOCAB, eos_ids=(EOS,), entries_max=3)
    texts = [Grammar(kind=K.REGEX, body="a" * n).write() for n in range(1, 6)]
    kept = [few.compile(text) for text in texts]
    assert len(few) == 3
    assert few.size_bytes == sum(one.size_bytes for one in kept[2:])
    assert few.compile(texts[4]) is kept[4]
    assert few.compile(texts[0]) is not kept[0]
    small = GrammarCompiler(Bytes(), vocab_size=VOCAB, eos_ids=(EOS,), bytes_max=kept[0].size_bytes)
    small.compile(texts[0])
    small.compile(texts[4])
    assert small.size_bytes <= kept[0].size_bytes
    few.close()
    small.close()


@pytest.mark.parametrize(
    ("body", "path"),
    [
        ({"not": {}}, "not"),
        ({"type": "array", "items": {"type": "array", "uniqueItems": True}}, "items.uniqueItems"),
        ({"type": "object", "properties": {"a": {"$ref": "http://x/y"}}}, "properties.a.$ref"),
        ({"type": "object", "required": ["a"]}, "required"),
        ({"type": "string", "pattern": "a", "maxLength": 3}, "pattern"),
        ({"maxLength": 3}, "type"),
        ({"type": "number", "multipleOf": 0.5}, "multipleOf"),
        ({"allOf": [{}, {}]}, "allOf"),
        ({"anyOf": {}}, "anyOf"),
        ([], ""),
    ],
)
def test_what_no_mask_enforces_is_refused_by_its_place(body: Any, path: str) -> None:
    with pytest.raises(InvalidArgument) as refused:
        read_grammar(schema(body))
    assert refused.value.field == ("grammar." + path).rstrip(".")


@pytest.mark.parametrize(
    "text",
    [
        "[" * 60_000,
        '{"json_schema":' + '{"items":' * 2000 + "{}" + "}" * 2001,
        json.dumps({"regex": "(" * 20_000 + "a" + ")" * 20_000}),
        json.dumps({"ebnf": "root ::= " + "(" * 20_000 + '"a"' + ")" * 20_000}),
        json.dumps({"ebnf": "root ::= nobody"}),
        json.dumps({"regex": "(?=a)b"}),
        json.dumps({"json_schema": {"$ref": "#/$defs/nothing"}}),
        json.dumps({"structural_tag": {"type": "structural_tag", "format": {"type": "tag"}}}),
    ],
    ids=range(8),
)
def test_hostile_texts_are_refused(compiler: GrammarCompiler, text: str) -> None:
    with pytest.raises(InvalidArgument) as refused:
        compiler.compile(text)
    assert (refused.value.field or "").startswith("grammar")


@given(st.text(max_size=60))
@settings(max_examples=100)
def test_any_text_compiles_or_is_refused(compiler: GrammarCompiler, text: str) -> None:
    for kind in ("regex", "ebnf"):
        try:
            compiled = compiler.compile(json.dumps({kind: text}))
        except InvalidArgument:
            continue
        assert compiled.size_bytes >= 0


def test_a_grammar_whose_masks_take_too_long_fails_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PATIENCE_S", 0.2)
    compiler = GrammarCompiler(Bytes(), vocab_size=VOCAB, eos_ids=(EOS,))
    compiled = compiler.compile('{"regex": "a+"}')
    released = [MonotonicClock()]  # the fill below spins until this is empty
    fill = GrammarState._fill

    def stuck(self: GrammarState) -> Any:
        while released and self in slow:
            pass
        return fill(self)

    monkeypatch.setattr(GrammarState, "_fill", stuck)
    slow: set[GrammarState] = set()
    bad, good = compiled.start(), compiled.start()
    slow.add(bad)
    waiting = bad.mask()
    behind = good.mask()
    assert allowed(behind) == [ord("a")], "what stood behind a stuck one is filled by another thread"
    assert len(allowed(waiting)) == VOCAB
    with pytest.raises(FailedPrecondition, match="too long"):
        bad.advance(ord("a"))
    good.advance(ord("a"))
    for _ in range(STUCK_MAX):
        another = compiled.start()
        slow.add(another)
        another.mask().words()
        if compiler._filler.is_stuck:
            break
    with pytest.raises(Overloaded):
        compiled.start()
    released.clear()
    compiler.close()


def test_the_packaged_vocabulary_writes_words_with_tokens() -> None:
    tokenizer = open_tokenizer("smollm2")
    compiler = GrammarCompiler(tokenizer, vocab_size=tokenizer.vocab_size, eos_ids=tokenizer.eos_ids)
    compiled = compiler.compile(Grammar(kind=K.REGEX, body="(Paris|London)").write())
    ids = tokenizer.encode("London")
    state = compiled.start()
    for token in ids:
        assert token in allowed(state.mask())
        state.advance(token)
    assert allowed(state.mask()) == list(tokenizer.eos_ids)
    assert not any(re.search(rb"<\|", tokenizer.token_bytes(token)) for token in allowed(compiled.start().mask()))
    compiler.close()
