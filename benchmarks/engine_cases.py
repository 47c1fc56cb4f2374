"""What `covey bench engine` asks of every system: prompts of real text, prefill, decode, and both at once."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

PREFILL_TOKENS = (128, 512, 2000)
DECODE_BATCHES = (1, 8, 32)
CONTEXT_TOKENS = 128
MIXED_BATCH, MIXED_TOKENS = 8, 512
SCHEMA_BATCH = 8
PREFILL, DECODE, MIXED = "prefill_tokens_per_s", "decode_tokens_per_s", "mixed_tokens_per_s"
SCHEMAS: tuple[Mapping[str, Any], ...] = (
    {"city": {"type": "string"}, "country": {"type": "string"}, "population": {"type": "integer"}},
    {"title": {"type": "string"}, "tags": {"type": "array", "items": {"type": "string"}, "maxItems": 8}},
    {"from": {"type": "string"}, "to": {"type": "string"}, "class": {"enum": ["economy", "business", "first"]}},
    {"name": {"type": "string"}, "age": {"type": "integer"}, "is_member": {"type": "boolean"}},
)
_STRIDE = 61
"""By so many tokens the text is turned from one prompt to the next, so that no two begin alike."""

_PROMPTS_MAX = 100
"""More than a round has."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One question to a driver. `rows` tokens go through each matrix in a step, `sampled` of them through the head."""

    name: str
    metric: str
    operation: str
    rows: int
    sampled: int
    context: int
    arguments: Mapping[str, Any]
    ours_only: bool = False

    def tokens_per_s(self, result: Any) -> float:
        """The rate that an answer means."""
        if self.operation == "prefill":
            return self.rows / float(result)
        if self.operation == "mixed":
            return float(result["tokens"] / sum(result["seconds"]))
        return float(self.rows * len(result) / sum(result))


def cases(text: Sequence[int], *, steps: int, salt: int) -> tuple[Case, ...]:
    """All questions of one round; another `salt` gives other prompts."""
    writer = _Prompts(text, salt)
    found = [
        Case(
            name=str(count),
            metric=PREFILL,
            operation="prefill",
            rows=count,
            sampled=1,
            context=0,
            arguments={"prompt": writer.prompt(count)},
        )
        for count in PREFILL_TOKENS
    ]
    found += [
        _decode(f"b{batch}", "decode", batch, {"prompts": writer.prompts(batch), "steps": steps}, steps)
        for batch in DECODE_BATCHES
    ]
    found.append(
        Case(
            name=f"b{MIXED_BATCH}-{MIXED_TOKENS}",
            metric=MIXED,
            operation="mixed",
            rows=MIXED_TOKENS + MIXED_BATCH,
            sampled=MIXED_BATCH,
            context=0,
            arguments={"prompts": writer.prompts(MIXED_BATCH), "prompt": writer.prompt(MIXED_TOKENS)},
        )
    )
    grammars = [schema_grammar(SCHEMAS[i % len(SCHEMAS)]) for i in range(SCHEMA_BATCH)]
    bound = {"prompts": writer.prompts(SCHEMA_BATCH), "steps": steps, "grammars": grammars}
    found.append(_decode(f"b{SCHEMA_BATCH}-schema", "constrained", SCHEMA_BATCH, bound, steps, ours_only=True))
    return tuple(found)


def _decode(
    name: str, operation: str, batch: int, arguments: Mapping[str, Any], steps: int, *, ours_only: bool = False
) -> Case:
    return Case(
        name=name,
        metric=DECODE,
        operation=operation,
        rows=batch,
        sampled=batch,
        context=CONTEXT_TOKENS + steps // 2,
        arguments=arguments,
        ours_only=ours_only,
    )


def schema_grammar(properties: Mapping[str, Any]) -> str:
    """An object with all of `properties`, in the form of `covey.types.grammar`."""
    schema = {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }
    return json.dumps({"json_schema": schema})


class _Prompts:
    """Cuts prompts out of a text that begins anew at its end."""

    def __init__(self, text: Sequence[int], salt: int) -> None:
        # A stride that divides the length would come back to the same few places.
        self._text = list(text[:-1]) if len(text) % _STRIDE == 0 else list(text)
        self._at = salt * _PROMPTS_MAX * _STRIDE

    def prompt(self, count: int) -> list[int]:
        self._at += _STRIDE
        return [self._text[(self._at + i) % len(self._text)] for i in range(count)]

    def prompts(self, batch: int) -> list[list[int]]:
        return [self.prompt(CONTEXT_TOKENS) for _ in range(batch)]
