"""What an answer must look like: the constraint's one written form, `GenerateRequest.grammar`, and what is refused.

The form is a JSON object with one member, named after its kind: `{"json_object": true}`, `{"json_schema": {…}}`,
`{"regex": "…"}`, `{"ebnf": "root ::= …"}` or `{"structural_tag": {…}}` (texts around values of schemas: tool calls).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import msgspec

from covey.errors import InvalidArgument

GRAMMAR_CHARS_MAX = 65_536
DEPTH_MAX = 64
"""Levels of objects and arrays in a schema's text."""


class GrammarKind(StrEnum):
    JSON_OBJECT = "json_object"
    JSON_SCHEMA = "json_schema"
    REGEX = "regex"
    EBNF = "ebnf"
    STRUCTURAL_TAG = "structural_tag"


_TEXTS = (GrammarKind.REGEX, GrammarKind.EBNF)

_LOOSE = frozenset(
    {
        "not", "if", "then", "else", "contains", "minContains", "maxContains", "dependencies", "dependentRequired",
        "dependentSchemas", "uniqueItems",
    }
)  # fmt: skip
"""Keywords that no mask enforces: refused by name, so that nobody believes they hold. `oneOf` is read as `anyOf`."""
_SCHEMAS = ("items", "additionalProperties", "additionalItems", "unevaluatedProperties", "propertyNames")
_LISTS = ("anyOf", "oneOf", "allOf", "prefixItems")
_MAPS = ("properties", "patternProperties", "$defs", "definitions")


@dataclass(frozen=True, slots=True, kw_only=True)
class Grammar:
    """A constraint. `body` is True, a schema, a pattern, an EBNF text (start rule `root`), or a structural tag."""

    kind: GrammarKind
    body: Any

    def write(self, field: str = "grammar") -> str:
        """The form that travels. Raises InvalidArgument (`field`) when it is too long."""
        text = msgspec.json.encode({self.kind.value: self.body}).decode()
        if len(text) > GRAMMAR_CHARS_MAX:
            raise InvalidArgument(f"takes {len(text)} characters, at most {GRAMMAR_CHARS_MAX} are allowed", field=field)
        return text


def read_grammar(text: str) -> Grammar:
    """The constraint that `write` wrote. Raises InvalidArgument (`grammar`) for anything else."""
    try:
        value = msgspec.json.decode(text)
    except (msgspec.DecodeError, RecursionError) as error:
        raise InvalidArgument(f"is not JSON: {error}", field="grammar") from error
    if not isinstance(value, dict) or len(value) != 1:
        raise InvalidArgument(_usage(), field="grammar")
    (name, body), *_ = value.items()
    if name not in set(GrammarKind):
        raise InvalidArgument(_usage(), field="grammar")
    grammar = Grammar(kind=GrammarKind(name), body=body)
    check_grammar(grammar, "grammar")
    return grammar


def check_grammar(grammar: Grammar, field: str) -> None:
    """Raise InvalidArgument (`field`) unless the body has its kind's shape and says nothing that would not hold."""
    kind, body = grammar.kind, grammar.body
    if kind is GrammarKind.JSON_OBJECT and body is not True:
        raise InvalidArgument("json_object is true or left out", field=field)
    if kind in _TEXTS and (not isinstance(body, str) or not body):
        raise InvalidArgument(f"{kind} needs a text", field=field)
    if kind is GrammarKind.JSON_SCHEMA:
        check_schema(body, field)
    if kind is GrammarKind.STRUCTURAL_TAG:
        if not isinstance(body, dict) or body.get("type") != "structural_tag":
            raise InvalidArgument("a structural tag is an object of that type", field=field)
        _check_tag(body, field, 0)


def check_schema(schema: Any, field: str) -> None:
    """Raise InvalidArgument, naming the place, unless every keyword of a JSON schema can be enforced."""
    if not isinstance(schema, dict):
        raise InvalidArgument("a JSON schema is an object", field=field)
    _check_schema(schema, field, 0)


def _check_schema(schema: Any, path: str, depth: int) -> None:
    if isinstance(schema, bool):
        return
    if not isinstance(schema, dict):
        raise InvalidArgument("a JSON schema is an object or a boolean", field=path)
    if depth > DEPTH_MAX:
        raise InvalidArgument(f"nests deeper than {DEPTH_MAX} levels", field=path)
    loose = sorted(_LOOSE & schema.keys())
    if loose:
        raise InvalidArgument(f"the keyword `{loose[0]}` cannot be enforced: leave it out", field=f"{path}.{loose[0]}")
    reference = schema.get("$ref")
    if reference is not None and not (isinstance(reference, str) and reference.startswith("#")):
        raise InvalidArgument("only references into the same schema (#/…) are followed", field=f"{path}.$ref")
    if isinstance(schema.get("allOf"), list) and len(schema["allOf"]) > 1:
        raise InvalidArgument("only an `allOf` of one schema can be enforced: merge them", field=f"{path}.allOf")
    _check_pairs(schema, path)
    for place, member in _members(schema, path):
        _check_schema(member, place, depth + 1)


def _members(schema: Mapping[str, Any], path: str) -> Iterator[tuple[str, Any]]:
    """The schemas within a schema, each with its place."""
    for key in _SCHEMAS:
        if key in schema:
            yield f"{path}.{key}", schema[key]
    for key in _LISTS:
        for i, member in enumerate(_list(schema, key, path)):
            yield f"{path}.{key}[{i}]", member
    for key in _MAPS:
        for name, member in _map(schema, key, path).items():
            yield f"{path}.{key}.{name}", member


def _check_pairs(schema: Mapping[str, Any], path: str) -> None:
    """Keywords that hold only beside others."""
    kinds = schema.get("type")
    kinds = kinds if isinstance(kinds, list) else [kinds]
    if "minLength" in schema or "maxLength" in schema:
        if "string" not in kinds:
            raise InvalidArgument('a length needs `"type": "string"`', field=f"{path}.type")
        other = next((k for k in ("pattern", "format") if k in schema), None)
        if other is not None:
            raise InvalidArgument(
                f"a length cannot be enforced beside `{other}`: leave one out", field=f"{path}.{other}"
            )
    if "multipleOf" in schema and kinds != ["integer"]:
        raise InvalidArgument("can be enforced for integers only", field=f"{path}.multipleOf")
    required = schema.get("required", [])
    if not isinstance(required, list) or not all(isinstance(name, str) for name in required):
        raise InvalidArgument("must be a list of names", field=f"{path}.required")
    unknown = sorted(set(required) - set(_map(schema, "properties", path)))
    if unknown:
        raise InvalidArgument(f"names {unknown[0]!r}, which `properties` does not describe", field=f"{path}.required")


def _list(schema: Mapping[str, Any], key: str, path: str) -> list[Any]:
    value = schema.get(key, [])
    if not isinstance(value, list):
        raise InvalidArgument("must be a list of schemas", field=f"{path}.{key}")
    return value


def _map(schema: Mapping[str, Any], key: str, path: str) -> Mapping[str, Any]:
    value = schema.get(key, {})
    if not isinstance(value, dict):
        raise InvalidArgument("must be an object of schemas", field=f"{path}.{key}")
    return value


def _check_tag(value: Any, path: str, depth: int) -> None:
    """Check the schemas within a structural tag."""
    if depth > DEPTH_MAX:
        raise InvalidArgument(f"nests deeper than {DEPTH_MAX} levels", field=path)
    if isinstance(value, dict):
        for key, member in value.items():
            if key == "json_schema":
                _check_schema(member, f"{path}.{key}", 0)
            else:
                _check_tag(member, path, depth + 1)
    elif isinstance(value, list):
        for member in value:
            _check_tag(member, path, depth + 1)


def _usage() -> str:
    return f"is an object of one member: {', '.join(GrammarKind)}"
