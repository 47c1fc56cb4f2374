"""A load over several nodes: good blocks stay, told layers are never written again."""

from __future__ import annotations

from typing import Any, cast

from covey.net.kv.partial import Partial
from covey.types.block import BlockShape
from covey.types.ids import BlockHash, NamespaceId, TenantId
from covey.types.store import Ready, StoreKey

SHAPE = BlockShape(size_bytes=12, layers=3)
NAMES = tuple(BlockHash(f"{i}".encode()) for i in range(4))


class Lease:
    """What `Partial` reads of a lease."""

    key = StoreKey(tenant=TenantId("t"), namespace=NamespaceId(b"n"), shape=SHAPE)
    hashes = NAMES


def partial(into: list[memoryview], ready: Ready | None = None) -> Partial:
    return Partial(cast("Any", Lease()), into, ready)


def blocks(fill: int = 0) -> list[memoryview]:
    return [memoryview(bytearray([fill]) * 12) for _ in NAMES]


def test_the_rest_goes_right_behind_what_is_good() -> None:
    into = blocks()
    load = partial(into)
    load.add(load.buffers(4), 1)
    assert load.hashes == NAMES[1:]
    rest = load.buffers(3)
    assert all(given is wanted for given, wanted in zip(rest, into[1:], strict=True))
    load.add(rest, 3)
    assert load.is_whole


def test_told_layers_are_not_written_again_and_each_is_told_once() -> None:
    told: list[int] = []
    into = blocks()
    load = partial(into, told.append)
    first = load.buffers(4)
    ready = load.ready(4)
    assert ready is not None
    for block in first:
        block[:4] = b"good"
    ready(1)
    load.add(first, 1)  # the node went away: one block is whole, one layer of all is
    rest = load.buffers(3)
    assert load.ready(3) is None
    for block in rest:
        block[:] = b"????" + b"restrest"
    load.add(rest, 3)
    assert [bytes(view) for view in into[1:]] == [b"goodrestrest"] * 3
    assert told == [1, 3]


def test_layers_are_not_told_while_later_blocks_are_missing() -> None:
    told: list[int] = []
    load = partial(blocks(), told.append)
    load.add(load.buffers(4), 0)
    assert load.ready(2) is None
    load.add(load.buffers(2), 2)
    assert told == []
    assert load.ready(2) is not None
    load.add(load.buffers(2), 2)
    assert told == [3]
