"""The journal's records: how a run's beginning and its changes are written down."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from hashlib import blake2b
from typing import Any

import msgspec

from covey.errors import DataCorrupt
from covey.policy import flow_event
from covey.policy.flow_event import FlowChange, Value
from covey.types.flow import SubmitRun
from covey.types.ids import TenantId

SCHEMA = 1
EVENT_BYTES = 1024
"""More than an event is without its text."""
PART_BYTES_MAX = 200 * 1024
"""Under what the bus carries, 256 KiB."""
KINDS: dict[str, type[Any]] = {
    cls.__name__: cls
    for cls in (
        flow_event.NodeStarted,
        flow_event.NodeRetried,
        flow_event.NodeSucceeded,
        flow_event.NodeFailed,
        flow_event.CancelRequested,
        flow_event.RunEnded,
    )
}
"""Names in records, for ever: a renamed class keeps its old name here."""


class Created(msgspec.Struct, frozen=True, kw_only=True, tag="created"):
    """The first record of a run; `spec` is an encoded `SubmitRun`, or `spec_blob` names the blob that holds it."""

    tenant: TenantId
    digest: bytes
    created_s: float
    workflow: str
    spec: bytes = b""
    spec_blob: str = ""
    owner: str = ""
    schema: int = SCHEMA


class Changes(msgspec.Struct, frozen=True, kw_only=True, tag="changes"):
    """Later records: events that became true together, as `(kind, fields)`; `owner` tells equal ones of two apart."""

    events: list[tuple[str, msgspec.Raw]]
    owner: str = ""
    schema: int = SCHEMA


_decoder = msgspec.msgpack.Decoder(Created | Changes)
_encoder = msgspec.msgpack.Encoder()


def digest_of(submit: SubmitRun) -> bytes:
    """Hash of a request's body, the same for equal requests."""
    return blake2b(msgspec.msgpack.encode(submit, order="deterministic"), digest_size=16).digest()


def encode_created(created: Created, owner: str) -> bytes:
    return _encoder.encode(msgspec.structs.replace(created, owner=owner))


def encode_changes(events: Sequence[FlowChange], owner: str) -> bytes:
    pairs = [(type(event).__name__, msgspec.Raw(_encoder.encode(event))) for event in events]
    return _encoder.encode(Changes(events=pairs, owner=owner))


def parts(events: Sequence[FlowChange]) -> Iterator[Sequence[FlowChange]]:
    """Split events into records that the bus carries."""
    begin, size = 0, 0
    for i, event in enumerate(events):
        text = event.value.text if isinstance(event, flow_event.NodeSucceeded) else getattr(event, "message", "")
        cost = EVENT_BYTES + 4 * len(text)  # a character is at most four bytes
        if size and size + cost > PART_BYTES_MAX:
            yield events[begin:i]
            begin, size = i, 0
        size += cost
    if begin < len(events):
        yield events[begin:]


def decode(payload: bytes) -> Created | tuple[FlowChange, ...]:
    """Read a record.

    Raises:
        DataCorrupt: it is none, or of a schema that this version does not know.
    """
    try:
        record = _decoder.decode(payload)
        if record.schema != SCHEMA:
            raise DataCorrupt(f"the journal is of schema {record.schema}, this version reads {SCHEMA}", field="schema")
        if isinstance(record, Created):
            return record
        return tuple(msgspec.msgpack.decode(raw, type=KINDS[kind]) for kind, raw in record.events)
    except (msgspec.MsgspecError, KeyError) as error:
        raise DataCorrupt("a journal record cannot be read", field="journal") from error


__all__ = ["Changes", "Created", "Value", "decode", "digest_of", "encode_changes", "encode_created", "parts"]
