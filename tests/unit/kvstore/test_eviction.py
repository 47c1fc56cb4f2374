"""Room for another slot size: an extent goes, not the store."""

from __future__ import annotations

from covey.policy.arena import Arena
from covey.policy.store_index import StoreIndex
from covey.types.ids import BlockHash
from covey.types.kv import BlockKey
from covey.types.kv_state import KvEventKind

from .index_calls import CHAINS, SHAPES, M, N, commit, keys, lookup, release, reserve

EXTENT = 16 * 4096 * 4
CHAIN = 16


def chain(number: int) -> tuple[BlockKey, ...]:
    names = [BlockHash(b"%04d%012d" % (number, i)) for i in range(CHAIN)]
    return tuple(BlockKey(hash=n, parent=names[i - 1] if i else BlockHash(b"")) for i, n in enumerate(names))


def full() -> StoreIndex:
    """Sixteen extents of sixteen slots each, every one of namespace N's size, a chain in each."""
    index = StoreIndex(arena=Arena(16 * EXTENT, extent_bytes=EXTENT), epoch=7, name="s")
    for number in range(16):
        reply = reserve(index, chain(number), float(number))
        commit(index, reply.lease, [grant.hash for grant in reply.grants], float(number))
        release(index, reply.lease, float(number))
    index.drain_changes()
    assert index.stats().used_bytes == 16 * EXTENT
    return index


def evicted(index: StoreIndex) -> list[BlockHash]:
    return [h for change in index.drain_changes() if change.kind is KvEventKind.EVICTED for h in change.hashes]


def test_another_slot_size_costs_an_extent_and_not_the_store() -> None:
    index = full()
    assert SHAPES[M].size_bytes < SHAPES[N].size_bytes
    assert len(reserve(index, keys(CHAINS[0], 0, 4), 20.0, ns=M).grants) == 4
    gone = evicted(index)
    assert gone == [block.hash for block in reversed(chain(0))], "the chain of the longest unused extent, leaf first"
    index.check()


def test_an_extent_with_a_leased_block_is_left_alone() -> None:
    index = full()
    for number in range(14):
        assert lookup(index, [chain(number)[0].hash], 20.0, ttl_s=100.0).lease is not None
    reserve(index, keys(CHAINS[0], 0, 1), 30.0, ns=M)
    index.check()
    for number in range(14):
        assert len(index.visible(N, [chain(number)[0].hash])) == 1
    assert len(index.visible(N, [block.hash for block in chain(14)])) == 0


def test_what_grows_from_a_block_in_the_extent_goes_too() -> None:
    index = StoreIndex(arena=Arena(16 * EXTENT, extent_bytes=EXTENT), epoch=7, name="s")
    let_go = [chain(1)[:8], chain(0)[:8], chain(1)[8:], chain(0)[8:]]
    # Extents: the start of 1 and what is leased; the start of 0 and the end of 1; the end of 0 and what is leased.
    for part in (let_go[0], chain(20)[:8], *let_go[1:], chain(21)[:8], *map(chain, range(2, 15))):
        reply = reserve(index, part, ttl_s=1000.0)
        commit(index, reply.lease, [grant.hash for grant in reply.grants])
        if part in let_go:
            release(index, reply.lease)
    index.drain_changes()
    reserve(index, keys(CHAINS[0], 0, 2), 30.0, ns=M)
    gone = evicted(index)
    assert set(gone) == {block.hash for block in (*chain(0), *chain(1)[8:])}
    assert set(gone[:2]) == {chain(0)[-1].hash, chain(1)[-1].hash}, "leaves first"
    index.check()
