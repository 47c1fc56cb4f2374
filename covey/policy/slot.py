"""The bytes around a stored block: a header that says what the slot holds, and how large both are."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import IntEnum

from covey.errors import DataCorrupt, InvalidArgument
from covey.policy.arena import PAGE_BYTES
from covey.types.ids import BlockHash, NamespaceId
from covey.types.kv import BlockShape

MAGIC = b"COVEYKV1"
_FIXED = struct.Struct("<8sIIQQIHH32s32s")
_ALIGN = 64


class SlotState(IntEnum):
    RESERVED = 1
    COMMITTED = 2


class SlotCodec(IntEnum):
    """How the payload is encoded; lossy ones serve only requests that allow them."""

    RAW = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class SlotHeader:
    """What a slot holds. `checksums` are xxh3-64 of each layer's payload."""

    state: SlotState
    generation: int
    namespace: NamespaceId
    hash: BlockHash
    shape: BlockShape
    checksums: tuple[int, ...]
    codec: SlotCodec = SlotCodec.RAW

    def pack(self) -> bytes:
        """Return the header's bytes; the index keeps one digest of exactly these."""
        fixed = _FIXED.pack(
            MAGIC, self.codec, self.state, self.generation, self.shape.size_bytes, self.shape.layers,
            len(self.namespace), len(self.hash), self.namespace, self.hash,
        )  # fmt: skip
        return fixed + struct.pack(f"<{self.shape.layers}Q", *self.checksums)

    @classmethod
    def unpack(cls, data: bytes | memoryview) -> SlotHeader:
        """Read a header. Raises `DataCorrupt` when it is none."""
        try:
            magic, codec, state, generation, size, layers, ns_len, hash_len, namespace, name = _FIXED.unpack_from(data)
            if magic != MAGIC:
                raise DataCorrupt("not the header of a slot")
            return cls(
                codec=SlotCodec(codec),
                state=SlotState(state),
                generation=generation,
                namespace=NamespaceId(namespace[:ns_len]),
                hash=BlockHash(name[:hash_len]),
                shape=BlockShape(size_bytes=size, layers=layers),
                checksums=struct.unpack_from(f"<{layers}Q", data, _FIXED.size),
            )
        except (struct.error, ValueError) as error:
            raise DataCorrupt("the header of a slot is damaged") from error


def header_bytes(shape: BlockShape) -> int:
    """Length of the packed header."""
    return _FIXED.size + 8 * shape.layers


def payload_offset(shape: BlockShape) -> int:
    """Where the payload starts within its slot."""
    return -(-header_bytes(shape) // _ALIGN) * _ALIGN


def slot_bytes(shape: BlockShape) -> int:
    """Size of the slot that holds a block. Raises `InvalidArgument` when layers do not divide the payload."""
    if shape.size_bytes % shape.layers:
        raise InvalidArgument("every layer of a block has the same size", field="shape.size_bytes")
    return -(-(payload_offset(shape) + shape.size_bytes) // PAGE_BYTES) * PAGE_BYTES
