"""Messages that are mostly one `data` field, read and written without copies of it; the wire format is protobuf's."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, TypeVar

from covey.codec.messages import decode, descriptor, encode
from covey.errors import InvalidArgument
from covey.types.kv import CHUNK_BYTES_MAX, BlockChunk, WriteChunk

C = TypeVar("C", BlockChunk, WriteChunk)

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_FIXED_SIZES = {_FIXED64: 8, _FIXED32: 4}
_VARINT_BYTES_MAX = 10


def encode_chunk(value: BlockChunk | WriteChunk) -> bytes:
    """Serialise a chunk: `data` comes last and is copied once. It may be a view of memory that changes later."""
    tag = _varint(_data_number(type(value)) << 3 | _BYTES)
    return b"".join((encode(replace(value, data=b"")), tag, _varint(len(value.data)), value.data))


def decode_chunk(cls: type[C], data: bytes) -> C:
    """Parse and check a chunk; its `data` is a view of the message.

    Raises:
        InvalidArgument: malformed bytes, or a field out of its bounds.
    """
    first, start, end = _find(data, _data_number(cls), cls.__name__)
    if end - start > CHUNK_BYTES_MAX:
        raise InvalidArgument(f"data: holds {end - start}, at most {CHUNK_BYTES_MAX} allowed", field="data")
    value: C = decode(cls, data[:first] + data[end:])
    return replace(value, data=memoryview(data)[start:end])


def _data_number(cls: type[Any]) -> int:
    return int(descriptor(cls.__name__).fields_by_name["data"].number)


def _find(data: bytes, wanted: int, name: str) -> tuple[int, int, int]:
    """Return where the field starts, and where its bytes start and end; the end of the message if it is not there."""
    at, found = 0, (len(data), len(data), len(data))
    while at < len(data):
        tag, after = _read_varint(data, at, name)
        kind = tag & 7
        if kind == _VARINT:
            _, after = _read_varint(data, after, name)
        elif kind == _BYTES:
            size, start = _read_varint(data, after, name)
            after = start + size
            if tag >> 3 == wanted:
                if found[0] < len(data):
                    raise InvalidArgument(f"malformed {name} message: data comes twice")
                found = (at, start, after)
        elif kind in _FIXED_SIZES:
            after += _FIXED_SIZES[kind]
        else:
            raise InvalidArgument(f"malformed {name} message")
        if after > len(data):
            raise InvalidArgument(f"malformed {name} message")
        at = after
    return found


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _read_varint(data: bytes, at: int, name: str) -> tuple[int, int]:
    value = 0
    for i in range(min(_VARINT_BYTES_MAX, len(data) - at)):
        byte = data[at + i]
        value |= (byte & 0x7F) << (7 * i)
        if byte < 0x80:
            return value, at + i + 1
    raise InvalidArgument(f"malformed {name} message")
