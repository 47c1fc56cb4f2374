"""Records of lower tiers: what they say of themselves is checked byte by byte."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from covey.errors import DataCorrupt
from covey.policy.disk_record import mark_dead, pack, pack_head, read_head, unpack
from covey.types.ids import BlockHash
from tests.support.records import new_chain, new_namespace, record

NAMESPACE = new_namespace()
RECORD = new_chain(2, NAMESPACE, tenant="tenant-ü")[1]
PACKED = pack(RECORD)


def test_what_was_packed_is_read_back() -> None:
    read = unpack(PACKED, NAMESPACE, RECORD.hash)
    assert (read.header, read.parent, read.tenant) == (RECORD.header, RECORD.parent, RECORD.tenant)
    assert read.payload == RECORD.payload
    assert read.raw_bytes == RECORD.header.shape.size_bytes


@settings(max_examples=300, deadline=None)
@given(at=st.integers(0, len(PACKED) - 1), bit=st.integers(0, 7))
def test_any_flipped_bit_that_matters_is_noticed(at: int, bit: int) -> None:
    head = read_head(PACKED, 0)
    padding = range(len(pack_head(RECORD, 0).rstrip(b"\0")), head.payload_at)
    data = bytearray(PACKED)
    data[at] ^= 1 << bit
    if at in padding:
        assert unpack(bytes(data), NAMESPACE, RECORD.hash).payload == RECORD.payload
    else:
        with pytest.raises(DataCorrupt):
            unpack(bytes(data), NAMESPACE, RECORD.hash)


@settings(max_examples=100, deadline=None)
@given(st.one_of(st.binary(max_size=600), st.integers(0, len(PACKED) - 1).map(lambda end: PACKED[:end])))
def test_neither_garbage_nor_a_piece_is_a_record(data: bytes) -> None:
    with pytest.raises(DataCorrupt):
        unpack(data, NAMESPACE, RECORD.hash)


def test_a_record_in_the_wrong_place_or_of_another_name_is_refused() -> None:
    placed = pack_head(RECORD, 5) + bytes(RECORD.payload)
    assert unpack(placed, NAMESPACE, RECORD.hash, 5).payload == RECORD.payload
    for data, name, place in ((placed, RECORD.hash, 6), (placed, BlockHash(bytes(16)), 5), (PACKED, RECORD.hash, 5)):
        with pytest.raises(DataCorrupt):
            unpack(data, NAMESPACE, name, place)


def test_a_dead_record_says_how_long_it_is_and_nothing_else() -> None:
    dead = mark_dead(PACKED)
    data = dead + PACKED[len(dead) :]
    head = read_head(data, 0)
    assert head.dead
    assert head.end == len(PACKED)
    with pytest.raises(DataCorrupt):
        unpack(data, NAMESPACE, RECORD.hash)
    with pytest.raises(DataCorrupt):
        mark_dead(b"x" * 4096)


def test_a_header_whose_checksums_are_another_payloads_is_refused() -> None:
    other = record(NAMESPACE, RECORD.hash, RECORD.parent)
    mixed = pack_head(RECORD, 0) + bytes(other.payload)
    with pytest.raises(DataCorrupt):
        unpack(mixed, NAMESPACE, RECORD.hash)
