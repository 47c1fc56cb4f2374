"""Function schemas of the Berkeley Function Calling Leaderboard, as JSON schemas whose values are short."""

from __future__ import annotations

import gzip
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FILES = ("BFCL_v4_simple_python.json.gz", "BFCL_v4_live_simple.json.gz")
_TYPES = {"dict": "object", "float": "number", "tuple": "array", "any": "string"}
_BOUNDS: Mapping[str, dict[str, Any]] = {
    "string": {"maxLength": 12},
    "array": {"maxItems": 2},
    "integer": {"minimum": -1000, "maximum": 1000},
    "number": {"minimum": -1000, "maximum": 1000},
    "object": {"additionalProperties": False},
    "boolean": {},
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A question, and the schema of the arguments of the function that answers it."""

    id: str
    question: str
    schema: dict[str, Any]


def load_cases(data: Path) -> list[Case]:
    """Every question with one function, of both files."""
    cases = []
    for name in FILES:
        with gzip.open(data / "bfcl" / name, "rt", encoding="utf-8") as lines:
            for row in map(json.loads, lines):
                question, function = row["question"][0][-1]["content"], row["function"][0]
                cases.append(Case(id=row["id"], question=question, schema=json_schema(function["parameters"])))
    return cases


def json_schema(theirs: Mapping[str, Any]) -> dict[str, Any]:
    """A parameter's schema with JSON schema's types, and bounds that keep any answer short."""
    kind = _TYPES.get(theirs["type"], theirs["type"])
    found: dict[str, Any] = {"type": kind}
    if "enum" in theirs:
        return {"enum": [value for value in theirs["enum"] if _is_of(value, kind)] or [None]}
    found |= _BOUNDS[kind]
    if kind == "object":
        properties = theirs.get("properties", {})
        found["properties"] = {name: json_schema(member) for name, member in properties.items()}
        found["required"] = [name for name in theirs.get("required", ()) if name in properties]
    if kind == "array":
        found["items"] = json_schema(theirs.get("items", {"type": "string"}))
    return found


def _is_of(value: Any, kind: str) -> bool:
    types: dict[str, tuple[type, ...]] = {"integer": (int,), "number": (int, float), "string": (str,)}
    return isinstance(value, types.get(kind, (object,)))
