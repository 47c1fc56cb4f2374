"""The codec of chunks is protobuf's wire format: either side may be another implementation of it."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from covey.codec.chunks import decode_chunk, encode_chunk
from covey.codec.messages import decode, encode
from covey.codec.methods import KvStore
from covey.errors import InvalidArgument
from covey.types.ids import BlockHash, LeaseId, TenantId
from covey.types.kv import CHUNK_BYTES_MAX, BlockChunk, WriteChunk

hashes = st.binary(min_size=16, max_size=16).map(BlockHash)
offsets = st.integers(0, 1 << 40)
bodies = st.binary(max_size=300)
block_chunks = st.builds(
    BlockChunk, hash=hashes, offset=offsets, data=bodies, checksums=st.lists(st.integers(0, 2**64 - 1)).map(tuple)
)
write_chunks = st.builds(
    WriteChunk, tenant=st.just(TenantId("t")), lease=st.just(LeaseId("l")), hash=hashes, offset=offsets, data=bodies
)


@given(block_chunks | write_chunks)
def test_both_codecs_read_what_either_writes(value: BlockChunk | WriteChunk) -> None:
    cls: Any = type(value)
    assert decode(cls, encode_chunk(value)) == value
    assert decode_chunk(cls, encode(value)) == value
    assert decode_chunk(cls, encode_chunk(value)) == value


@given(st.binary(max_size=200))
def test_garbage_is_refused_as_the_ordinary_codec_refuses_it(data: bytes) -> None:
    classes: tuple[Any, ...] = (BlockChunk, WriteChunk)
    for cls in classes:
        try:
            value = decode_chunk(cls, data)
        except InvalidArgument:
            continue
        assert decode(cls, data) == value


def test_bytes_travel_without_a_copy_on_the_way_in() -> None:
    message = encode_chunk(BlockChunk(hash=BlockHash(bytes(16)), offset=0, data=bytes(1000)))
    data = decode_chunk(BlockChunk, message).data
    assert isinstance(data, memoryview)
    assert data.obj is message


def test_a_chunk_over_the_limit_is_refused() -> None:
    with pytest.raises(InvalidArgument, match="data"):
        decode_chunk(WriteChunk, encode_chunk(_chunk(CHUNK_BYTES_MAX + 1)))
    assert len(decode_chunk(WriteChunk, encode_chunk(_chunk(CHUNK_BYTES_MAX))).data) == CHUNK_BYTES_MAX


def test_the_rpcs_of_blocks_use_it() -> None:
    chunk = _chunk(10)
    assert KvStore.WRITE.encode_request(chunk) == encode_chunk(chunk)
    assert isinstance(KvStore.WRITE.decode_request(encode(chunk)).data, memoryview)


def _chunk(size: int) -> WriteChunk:
    return WriteChunk(lease=LeaseId("l"), hash=BlockHash(bytes(16)), offset=0, data=bytes(size))
