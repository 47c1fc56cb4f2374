"""JSON schemas as xgrammar is to read them: what it would enforce loosely, written so that it holds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

_CHARACTER_RANGES = (
    r" !#-\[\]-~",
    r"\x80-\u07ff",
    r"\u0800-\u0fff",
    r"\u1000-\ucfff",
    r"\ud000-\ud7ff",
    r"\ue000-\uffff",
    r"\u{10000}-\u{3ffff}",
    r"\u{40000}-\u{fffff}",
    r"\u{100000}-\u{10ffff}",
)
"""What may stand in a JSON text unescaped, split where UTF-8 changes its first bytes: a range across such a place lets
xgrammar produce overlong forms. Its own form of a bounded string also allows control characters, which JSON forbids.
"""
_CHARACTER = "(" + "|".join(f"[{part}]" for part in _CHARACTER_RANGES) + ")"

PATTERN_LENGTH_MAX = 128
"""Longest bound of a string that is a pattern: beyond, a mask would take longer than a step."""
_LOOSE_CHARACTERS = (r"[^\0-\x1f\"\\\r\n]", r"[^\"\\\r\n]")
_STRICT_CHARACTER = r"[^\0-\x1f\"\\\ud800-\udfff]"
"""A character of a string as xgrammar writes it, and without control characters and halves of surrogate pairs, which
are no UTF-8.
"""

_SCHEMAS = ("items", "additionalProperties", "additionalItems", "unevaluatedProperties", "propertyNames")
_LISTS = ("anyOf", "oneOf", "allOf", "prefixItems")
_MAPS = ("properties", "patternProperties", "$defs", "definitions")


def grammar_of_schema(schema: Any, *, is_closed: bool = True) -> str:
    """The EBNF of a JSON schema; a closed one allows no properties but those that are described.

    No optional white space: a model that may always add one more blank need never end. Raises RuntimeError or
    ValueError, xgrammar's, for what is no schema.
    """
    import xgrammar

    text = msgspec.json.encode(bounded(schema)).decode()
    found = str(xgrammar.Grammar.from_json_schema(text, any_whitespace=False, strict_mode=is_closed))
    for loose in _LOOSE_CHARACTERS:
        found = found.replace(loose, _STRICT_CHARACTER)
    return found


def grammar_tag(value: Any) -> Any:
    """A structural tag whose schemas are `grammar_of_schema`."""
    if isinstance(value, Mapping):
        if value.get("type") == "json_schema" and "json_schema" in value:
            return {"type": "grammar", "grammar": grammar_of_schema(value["json_schema"])}
        return {name: grammar_tag(member) for name, member in value.items()}
    if isinstance(value, list):
        return [grammar_tag(member) for member in value]
    return value


def bounded(schema: Any) -> Any:
    """The same schema with small bounds on a string's length written as a pattern."""
    if not isinstance(schema, Mapping):
        return schema
    found = dict(schema)
    for key in _SCHEMAS:
        if key in found:
            found[key] = bounded(found[key])
    for key in _LISTS:
        if key in found:
            found[key] = [bounded(member) for member in found[key]]
    for key in _MAPS:
        if key in found:
            found[key] = {name: bounded(member) for name, member in found[key].items()}
    low, high = found.get("minLength", 0), found.get("maxLength", "")
    if (low or high != "") and max(low, high or 0) <= PATTERN_LENGTH_MAX:
        found = {name: value for name, value in found.items() if name not in ("minLength", "maxLength")}
        if "enum" not in found and "const" not in found:
            found["pattern"] = f"^{_CHARACTER}{{{low},{high}}}$"
    return found
