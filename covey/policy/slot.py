"""The bytes around a stored block: a header that says what the slot holds, and how large both are."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import IntEnum

from covey.errors import DataCorrupt, InvalidArgument
from covey.policy.arena import PAGE_BYTES
from covey.types.block import BlockCodec, BlockShape, KvElement
from covey.types.ids import BlockHash, NamespaceId

MAGIC = b"COVEYKV2"
_FIXED = struct.Struct("<8sHHIQQIHHHHHH32s32s")
_ALIGN = 64


class SlotState(IntEnum):
    RESERVED = 1
    COMMITTED = 2


class SlotCodec(IntEnum):
    """`BlockCodec` as a number."""

    RAW = 0
    FP16 = 1
    INT8 = 2
    PQ4 = 3
    XQUANT = 4


_ELEMENTS = tuple(KvElement)


@dataclass(frozen=True, slots=True, kw_only=True)
class SlotHeader:
    """What a slot holds. `checksums` are xxh3-64 of each layer's payload, as it lies in the slot.

    `shape.size_bytes` is the size of the payload as it is encoded; the other fields describe what it decodes to.
    """

    state: SlotState
    generation: int
    namespace: NamespaceId
    hash: BlockHash
    shape: BlockShape
    checksums: tuple[int, ...]
    codec: BlockCodec = BlockCodec.RAW

    def pack(self) -> bytes:
        """Return the header's bytes; the index keeps one digest of exactly these."""
        shape = self.shape
        fixed = _FIXED.pack(
            MAGIC, SlotCodec[self.codec.name], _ELEMENTS.index(shape.element), self.state, self.generation,
            shape.size_bytes, shape.layers, shape.kv_heads, shape.head_dim, shape.tokens, 0,
            len(self.namespace), len(self.hash), self.namespace, self.hash,
        )  # fmt: skip
        return fixed + struct.pack(f"<{shape.layers}Q", *self.checksums)

    @classmethod
    def unpack(cls, data: bytes | memoryview) -> SlotHeader:
        """Read a header. Raises `DataCorrupt` when it is none."""
        try:
            (
                magic, codec, element, state, generation, size, layers, kv_heads, head_dim, tokens, _,
                ns_len, hash_len, namespace, name,
            ) = _FIXED.unpack_from(data)  # fmt: skip
            if magic != MAGIC:
                raise DataCorrupt("not the header of a slot")
            return cls(
                codec=BlockCodec[SlotCodec(codec).name],
                state=SlotState(state),
                generation=generation,
                namespace=NamespaceId(namespace[:ns_len]),
                hash=BlockHash(name[:hash_len]),
                shape=BlockShape(
                    size_bytes=size,
                    layers=layers,
                    element=_ELEMENTS[element],
                    kv_heads=kv_heads,
                    head_dim=head_dim,
                    tokens=tokens,
                ),
                checksums=struct.unpack_from(f"<{layers}Q", data, _FIXED.size),
            )
        except (struct.error, ValueError, IndexError) as error:
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
