"""Reading a request: its bytes under a limit, its JSON against a schema, each fault named by its field."""

from __future__ import annotations

import re
from typing import Any, TypeVar

import msgspec
from starlette.types import Receive, Scope

from covey.errors import Cancelled, InvalidArgument, PayloadTooLarge

from .schema import NOT_YET

T = TypeVar("T")

_PATH = re.compile(r" - at `\$\.?(?P<path>[^`]*)`$")
_UNKNOWN = re.compile(r"Object contains unknown field `(?P<name>[^`]*)`")
_MISSING = re.compile(r"Object missing required field `(?P<name>[^`]*)`")


class NotSupportedYet(InvalidArgument):
    """A field of OpenAI's without effect here; 400, since clients retry 5xx."""


class UnknownField(InvalidArgument):
    """A field that neither OpenAI nor Covey has."""


async def read_body(scope: Scope, receive: Receive, bytes_max: int) -> bytes:
    """The whole body, of at most `bytes_max`; a larger one is refused as soon as that is known.

    Raises:
        PayloadTooLarge: by its announced length, or while it is read.
        Cancelled: the client went away.
    """
    announced = dict(scope["headers"]).get(b"content-length", b"")
    if announced.isdigit() and int(announced) > bytes_max:
        raise PayloadTooLarge(f"the body is larger than {bytes_max} bytes")
    parts: list[bytes] = []
    size = 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise Cancelled("the client went away")
        part = message.get("body", b"")
        size += len(part)
        if size > bytes_max:
            raise PayloadTooLarge(f"the body is larger than {bytes_max} bytes")
        parts.append(part)
        if not message.get("more_body", False):
            return b"".join(parts)


def parse(data: bytes, cls: type[T]) -> T:
    """Decode a JSON body.

    A field that is null counts as not sent, as OpenAI's clients mean it.

    Raises:
        InvalidArgument: broken JSON, or a field that is unknown, missing or out of range; `field` is its path.
        NotSupportedYet: a field of OpenAI's that is not supported yet; `field` is its path.
    """
    try:
        try:
            return msgspec.json.decode(data, type=cls, strict=True)
        except msgspec.ValidationError as error:  # perhaps only because of nulls
            return msgspec.convert(_without_nulls(_untyped(data, error)), cls, str_keys=True)
    except msgspec.ValidationError as error:
        raise _named(error) from error
    except msgspec.DecodeError as error:
        raise InvalidArgument(f"the body is not valid JSON: {error}") from error
    except UnicodeDecodeError as error:
        raise InvalidArgument(f"the body is not UTF-8: byte {error.start} of a text") from error
    except RecursionError as error:
        raise InvalidArgument("the body is nested too deeply") from error


def _untyped(data: bytes, reason: msgspec.ValidationError) -> Any:
    """Any JSON; when a number is too large for that too, `reason` says better where it stands."""
    try:
        return msgspec.json.decode(data)
    except msgspec.ValidationError as error:
        raise reason from error


_SCHEMAS = ("schema", "parameters")
"""What is somebody's JSON schema: null means something in there."""


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: v if k in _SCHEMAS else _without_nulls(v) for k, v in value.items() if v is not None}
    if isinstance(value, list):
        return [_without_nulls(v) for v in value]
    return value


def _named(error: msgspec.ValidationError) -> InvalidArgument:
    text = str(error)
    at = _PATH.search(text)
    path = at["path"] if at else ""
    reason = text[: at.start()] if at else text
    unknown = _UNKNOWN.search(reason)
    missing = _MISSING.search(reason)
    name = (unknown or missing or {"name": ""})["name"]
    field = ".".join(part for part in (path, name) if part) or None
    if unknown and name in NOT_YET:
        return NotSupportedYet(f"`{field}` is not supported yet: leave it out", field=field)
    if unknown:
        return UnknownField(f"unknown field `{field}`", field=field)
    if missing:
        return InvalidArgument(f"`{field}` is required", field=field)
    return InvalidArgument(f"`{field}`: {reason}" if field else reason, field=field)
