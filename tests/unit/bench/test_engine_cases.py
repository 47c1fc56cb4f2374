"""The questions of a round: the shapes that were promised, no prompt twice, and rates out of answers."""

from __future__ import annotations

import pytest

from benchmarks.engine_cases import CONTEXT_TOKENS, SCHEMAS, cases, schema_grammar
from covey.types.grammar import GrammarKind, read_grammar

TEXT = list(range(1000, 1997))


def named(salt: int = 0) -> dict[str, object]:
    return {case.name: case for case in cases(TEXT, steps=16, salt=salt)}


def test_every_size_that_was_promised_is_asked_for() -> None:
    assert set(named()) == {"128", "512", "2000", "b1", "b8", "b32", "b8-512", "b8-schema"}


def test_prompts_have_their_length_and_differ_within_and_between_rounds() -> None:
    seen: list[tuple[int, ...]] = []
    for salt in range(3):
        for case in cases(TEXT, steps=16, salt=salt):
            prompts = [*case.arguments.get("prompts", ()), *filter(None, [case.arguments.get("prompt")])]
            if case.operation in {"decode", "constrained"}:
                assert [len(prompt) for prompt in prompts] == [CONTEXT_TOKENS] * case.rows
            seen += [tuple(prompt) for prompt in prompts]
    heads = {prompt[:32] for prompt in seen}
    assert len(heads) == len(seen)


@pytest.mark.parametrize(
    ("name", "answer", "rate"),
    [
        ("512", 2.0, 256.0),
        ("b8", [0.1, 0.3], 8 * 2 / 0.4),
        ("b8-512", {"seconds": [1.0, 1.0], "tokens": 528}, 264.0),
        ("b8-schema", [0.5] * 4, 16.0),
    ],
)
def test_an_answer_is_a_rate(name: str, answer: object, rate: float) -> None:
    (case,) = (case for case in cases(TEXT, steps=16, salt=0) if case.name == name)
    assert case.tokens_per_s(answer) == pytest.approx(rate)


@pytest.mark.parametrize("properties", SCHEMAS)
def test_the_schemas_are_grammars(properties: dict[str, object]) -> None:
    found = read_grammar(schema_grammar(properties))
    assert found.kind is GrammarKind.JSON_SCHEMA
    assert set(found.body["properties"]) == set(properties)
