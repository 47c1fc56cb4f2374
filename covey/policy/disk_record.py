"""The bytes of a block below memory: who it is, where it belongs, what it grows from, its slot header, its payload."""

from __future__ import annotations

import struct
from dataclasses import dataclass

import xxhash

from covey.errors import DataCorrupt
from covey.policy.slot import SlotHeader, SlotState
from covey.types.ids import BlockHash, NamespaceId, TenantId

MAGIC = b"COVEYREC"
SCHEMA = 1
RECORD_ALIGN = 4096
"""Records start at multiples of this, so that the one after a damaged head can be found."""
HEAD_BYTES_MAX = 1 << 16
_FIXED = struct.Struct("<8sHHHHIQQQ")
_SUM = struct.Struct("<Q")
_PAYLOAD_ALIGN = 64
_DEAD = 1

Place = int
"""Where a record belongs, so that one which lies elsewhere is noticed: segment and offset on disk; 0 in an engine."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """A block as lower tiers keep it. `raw_bytes` is the size of its payload before it was encoded.

    The payload has the checksums of `header`, one for each layer; whoever reads it compares them.
    """

    header: SlotHeader
    parent: BlockHash
    tenant: TenantId
    payload: bytes | memoryview
    raw_bytes: int = 0

    @property
    def namespace(self) -> NamespaceId:
        return self.header.namespace

    @property
    def hash(self) -> BlockHash:
        return self.header.hash


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordHead:
    """All of a record but its payload, which starts `payload_at` bytes after the record does."""

    header: SlotHeader
    parent: BlockHash
    tenant: TenantId
    raw_bytes: int
    payload_at: int
    dead: bool

    @property
    def end(self) -> int:
        """Length of the record without its padding."""
        return self.payload_at + self.header.shape.size_bytes


def pack_head(record: Record, place: Place, *, dead: bool = False) -> bytes:
    """Return everything that stands before the payload; `place` and all names are under its checksum."""
    header, tenant = record.header.pack(), record.tenant.encode()
    fixed = _FIXED.pack(
        MAGIC, SCHEMA, _DEAD if dead else 0, len(tenant), len(record.parent), len(header),
        record.header.shape.size_bytes, record.raw_bytes or record.header.shape.size_bytes, place,
    )  # fmt: skip
    body = fixed + header + record.parent + tenant
    head = _SUM.pack(xxhash.xxh3_64_intdigest(body)) + body
    return head.ljust(_aligned(len(head), _PAYLOAD_ALIGN), b"\0")


def pack(record: Record) -> bytes:
    """Return a record as engines keep it."""
    return b"".join((pack_head(record, 0), record.payload))


def read_head(data: bytes | memoryview, place: Place) -> RecordHead:
    """Read a head that may be longer than `data` shows, up to `HEAD_BYTES_MAX`.

    Raises:
        DataCorrupt: it is none, was damaged, or belongs elsewhere; the message says which.
    """
    try:
        (expected,) = _SUM.unpack_from(data)
        magic, schema, flags, tenant_len, parent_len, header_len, size, raw, where = _FIXED.unpack_from(data, _SUM.size)
    except struct.error as error:
        raise DataCorrupt("a record was cut off") from error
    if magic != MAGIC or schema != SCHEMA:
        raise DataCorrupt("not a record")
    start = _SUM.size + _FIXED.size
    end = start + header_len + parent_len + tenant_len
    if end > min(len(data), HEAD_BYTES_MAX):
        raise DataCorrupt("a record was cut off")
    body = bytes(data[_SUM.size : end])
    if xxhash.xxh3_64_intdigest(body) != expected:
        raise DataCorrupt("the head of a record is damaged")
    if where != place:
        raise DataCorrupt("a record lies where another one belongs")
    body = body[_FIXED.size :]
    header = SlotHeader.unpack(body[:header_len])
    if header.state is not SlotState.COMMITTED or header.shape.size_bytes != size:
        raise DataCorrupt("a record's names do not fit together")
    return RecordHead(
        header=header,
        parent=BlockHash(body[header_len : header_len + parent_len]),
        tenant=TenantId(body[header_len + parent_len :].decode("utf-8", "replace")),
        raw_bytes=raw,
        payload_at=_aligned(end, _PAYLOAD_ALIGN),
        dead=bool(flags & _DEAD),
    )


def unpack(data: bytes | memoryview, namespace: NamespaceId, name: BlockHash, place: Place = 0) -> Record:
    """Return the record of a block, its layers verified.

    Raises:
        DataCorrupt: it is damaged, cut off, dead, or another block's.
    """
    head = read_head(data, place)
    if (head.header.namespace, head.header.hash) != (namespace, name) or head.dead:
        raise DataCorrupt("a record is another block's")
    if len(data) < head.end:
        raise DataCorrupt("a record was cut off")
    payload = memoryview(data)[head.payload_at : head.end]
    if not has_sums(payload, head.header):
        raise DataCorrupt("a layer does not have its checksum")
    return Record(header=head.header, parent=head.parent, tenant=head.tenant, payload=payload, raw_bytes=head.raw_bytes)


def mark_dead(data: bytes) -> bytes:
    """Return the start of a head, to be written over it, that makes the record dead; its length still stands there.

    Raises:
        DataCorrupt: there is no head.
    """
    try:
        magic, schema, flags, tenant_len, parent_len, header_len, size, raw, where = _FIXED.unpack_from(data, _SUM.size)
    except struct.error as error:
        raise DataCorrupt("a record was cut off") from error
    end = _SUM.size + _FIXED.size + header_len + parent_len + tenant_len
    if magic != MAGIC or end > len(data):
        raise DataCorrupt("not a record")
    fixed = _FIXED.pack(magic, schema, flags | _DEAD, tenant_len, parent_len, header_len, size, raw, where)
    body = fixed + data[_SUM.size + _FIXED.size : end]
    return _SUM.pack(xxhash.xxh3_64_intdigest(body)) + fixed


def starts_record(data: bytes) -> bool:
    """Whether this looks like the head of a record, good or bad."""
    return data[_SUM.size : _SUM.size + len(MAGIC)] == MAGIC


def has_sums(payload: memoryview, header: SlotHeader) -> bool:
    """Whether each layer of a payload has its checksum."""
    size, rest = divmod(header.shape.size_bytes, header.shape.layers)
    if rest or len(payload) != header.shape.size_bytes:
        return False
    starts = range(0, len(payload), size)
    return all(
        xxhash.xxh3_64_intdigest(payload[at : at + size]) == expected
        for at, expected in zip(starts, header.checksums, strict=True)
    )


def record_bytes(head: bytes, payload_bytes: int) -> int:
    """Size of a record on disk, with its padding."""
    return _aligned(len(head) + payload_bytes, RECORD_ALIGN)


def _aligned(size: int, align: int) -> int:
    return -(-size // align) * align
