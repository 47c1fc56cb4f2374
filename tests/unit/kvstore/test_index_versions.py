"""Versions of a block in the index: one is always visible, exact numbers take the place of lossy ones."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from covey.errors import CoveyError
from covey.policy.rights import STORE
from covey.policy.store_index import StoreIndex
from covey.types.block import BlockCodec
from covey.types.ids import BlockHash
from covey.types.kv import GrantStatus, LeaseGrant, LeaseRequest, LookupReply, LookupRequest, PinKind
from covey.types.kv_state import KvEventKind

from .index_calls import CHAINS, SHAPES, N, T, commit, keys, lookup, make, pin, put, release, reserve

CHAIN = CHAINS[0][:4]
STEPS = ("recode", "write", "begin", "read", "pin", "release", "wait")
SMALL = SHAPES[N].size_bytes // 2


def find(index: StoreIndex, now: float = 0.0, *codecs: BlockCodec, hashes: list[BlockHash] = CHAIN) -> LookupReply:
    return index.lookup(
        LookupRequest(
            tenant=T, namespace=N, hashes=tuple(hashes), owner="r", ttl_s=10.0, shape=SHAPES[N], codecs=codecs
        ),
        now,
    )


def recode(index: StoreIndex, names: list[BlockHash], now: float = 0.0) -> int:
    """A whole recode of some blocks into INT8, as a node does it."""
    grant, drafts = index.draft(N, dict.fromkeys(names, SMALL), BlockCodec.INT8, owner="store", ttl_s=5.0, now=now)
    found = index.replace(grant.lease, {draft.location.hash: 77 for draft in drafts}, now)
    index.release(LeaseRequest(tenant=STORE, lease=grant.lease, epoch=grant.epoch), now)
    return found


def test_a_reader_without_the_codec_misses_from_there_on() -> None:
    index = make()
    release(index, put(index, CHAIN, 4))
    assert recode(index, CHAIN[1:2]) == 1
    assert len(find(index).blocks) == 1
    found = find(index, 0.0, BlockCodec.INT8)
    assert [block.codec for block in found.blocks] == [BlockCodec.RAW, BlockCodec.INT8, BlockCodec.RAW, BlockCodec.RAW]
    assert found.blocks[1].size_bytes == SMALL
    assert KvEventKind.RECODED in {change.kind for change in index.drain_changes()}
    index.check()


def test_an_exact_write_takes_the_place_of_a_lossy_block_and_its_lease_covers_it() -> None:
    index = make()
    release(index, put(index, CHAIN, 4))
    recode(index, CHAIN[:3])
    used = index.stats().used_bytes
    reply = reserve(index, keys(CHAIN, 0, 4))
    assert [grant.status for grant in reply.grants] == [*[GrantStatus.GRANTED] * 3, GrantStatus.EXISTS]
    assert len(find(index).blocks) == 0, "until the commit nothing has changed"
    commit(index, reply.lease, CHAIN[:3])
    index.check()
    assert [placed.codec for placed in index.locate(reply.lease.lease, CHAIN, 0.0)] == [BlockCodec.RAW] * 4
    release(index, reply.lease)
    found = find(index)
    assert len(found.blocks) == 4
    assert found.lease is not None
    release(index, found.lease)
    assert index.stats().used_bytes > used, "the lossy slots are free, the exact ones are larger"
    index.check()


def test_a_writer_that_goes_leaves_the_lossy_version() -> None:
    index = make(cooling_s=1.0)
    release(index, put(index, CHAIN, 2))
    recode(index, CHAIN[:2])
    reserve(index, keys(CHAIN, 0, 2), ttl_s=2.0)
    index.expire(2.5)
    index.check()
    assert len(find(index, 2.5, BlockCodec.INT8, hashes=CHAIN[:2]).blocks) == 2
    used = index.stats().used_bytes
    index.expire(4.0)
    assert index.stats().used_bytes < used, "its slots rested first"
    index.check()


@given(st.data())
def test_some_version_of_every_block_is_always_visible(data: st.DataObject) -> None:
    index, now = make(capacity=64 * 4096 * 8), 0.0
    release(index, put(index, CHAIN, 4))
    leases: list[LeaseGrant] = []
    for step in data.draw(st.lists(st.sampled_from(STEPS), max_size=25)):
        names = [CHAIN[i] for i in sorted(data.draw(st.sets(st.integers(0, 3), min_size=1)))]
        now += 1.0 if step == "wait" else 0.0
        try:
            if step == "recode":
                recode(index, names, now)
            elif step in {"write", "begin"}:
                reply = reserve(index, keys(CHAIN, 0, 4), now, ttl_s=3.0)
                granted = [grant.hash for grant in reply.grants if grant.status is GrantStatus.GRANTED]
                if step == "write":
                    commit(index, reply.lease, granted, now)
                leases.append(reply.lease)
            elif step == "read" and (held := lookup(index, CHAIN, now, ttl_s=3.0).lease) is not None:
                leases.append(held)
            elif step == "pin":
                leases.append(pin(index, CHAIN, now, kind=PinKind.HARD, ttl_s=3.0))
            elif step == "release" and leases:
                release(index, leases.pop(data.draw(st.integers(0, len(leases) - 1))), now)
        except CoveyError:
            pass  # a lease that ended meanwhile, or no room: what is visible stays
        index.check()
        reply_of_all = find(index, now, BlockCodec.INT8)
        assert [block.hash for block in reply_of_all.blocks] == CHAIN
        assert reply_of_all.lease is not None
        release(index, reply_of_all.lease, now)
        index.check()
