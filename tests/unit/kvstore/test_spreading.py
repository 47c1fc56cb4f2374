"""What a node copies, keeps and gives up: driven over a real index, with a copier that notes what it is told."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

from covey.errors import Unavailable
from covey.policy.rebalance import Duty
from covey.policy.store_index import StoreIndex
from covey.types.ids import BlockHash, NamespaceId, WorkerId
from covey.types.kv import BlockKey
from covey.types.store import StoreKey
from services.kvstore.spreading import Spreader

from .index_calls import CHAINS, N, commit, keys, lookup, make, release, reserve

B, C = WorkerId("b"), WorkerId("c")


class Actor:
    """Does what it is asked at once."""

    def __init__(self, index: StoreIndex) -> None:
        self._store = SimpleNamespace(index=index)

    async def ask(self, command: Any, *, timeout_s: float) -> Any:
        assert timeout_s
        return command.act(self._store, 0.0)


class Copies:
    """A copier to nodes of which some are away."""

    def __init__(self, *, away: Sequence[WorkerId] = ()) -> None:
        self.copied_blocks = 0
        self.told: list[tuple[WorkerId, list[BlockHash]]] = []
        self._away = away

    async def copy(self, key: StoreKey, blocks: Sequence[BlockKey], to: WorkerId) -> int:
        assert key.namespace == N
        assert [b.parent for b in blocks if b.parent in {a.hash for a in blocks}] == [
            b.parent for i, b in enumerate(blocks) if b.parent in {a.hash for a in blocks[:i]}
        ], "a child before its parent"
        self.told.append((to, [block.hash for block in blocks]))
        if to in self._away:
            raise Unavailable("away")
        return len(blocks)


def stored(*chains: int, blocks: int = 4) -> StoreIndex:
    index = make()
    for number in chains:
        reply = reserve(index, keys(CHAINS[number], 0, blocks))
        commit(index, reply.lease, CHAINS[number][:blocks])
        release(index, reply.lease, 0.0)
    return index


def spreader(index: StoreIndex, copies: Copies) -> Spreader:
    return Spreader(Actor(index), copies)  # type: ignore[arg-type]


def by_root(duties: dict[BlockHash, Duty]) -> Any:
    def duty(namespace: NamespaceId, root: BlockHash) -> Duty:
        assert namespace == N
        return duties[root]

    return duty


async def test_a_walk_copies_what_is_owed_and_gives_up_what_others_own() -> None:
    index, copies = stored(0, 1, 2), Copies()
    duties = {
        CHAINS[0][0]: Duty(keep=True, to=()),
        CHAINS[1][0]: Duty(keep=True, to=(B, C)),
        CHAINS[2][0]: Duty(keep=False, to=(C,)),
    }
    done = await spreader(index, copies).sweep(by_root(duties))
    assert (done.blocks, done.dropped, done.late) == (12, 4, set())
    told = {to: set(names) for to, names in copies.told}
    assert told == {B: set(CHAINS[1][:4]), C: {*CHAINS[1][:4], *CHAINS[2][:4]}}
    assert index.visible(N, CHAINS[2]) == ()
    assert len(index.visible(N, CHAINS[0] + CHAINS[1])) == 8


async def test_what_did_not_get_there_and_what_is_leased_stays() -> None:
    index = stored(0, 1)
    held = lookup(index, CHAINS[1][:2])
    duties = {CHAINS[0][0]: Duty(keep=False, to=(B,)), CHAINS[1][0]: Duty(keep=False, to=(C,))}
    done = await spreader(index, Copies(away=(B,))).sweep(by_root(duties))
    assert done.late == set(CHAINS[0][:4])
    assert done.dropped == 2
    assert len(index.visible(N, CHAINS[0])) == 4
    assert held.lease is not None
    assert [p.location.hash for p in index.visible(N, CHAINS[1])] == CHAINS[1][:2]


async def test_the_end_of_a_long_chain_belongs_to_its_first_block() -> None:
    index, copies = stored(0, blocks=8), Copies()
    duties = by_root({CHAINS[0][0]: Duty(keep=True, to=(B,))})
    spread = spreader(index, copies)
    for part in (CHAINS[0][6:], CHAINS[0][:2], CHAINS[0][3:5]):
        done = await spread.spread(N, part, duties)
        assert done.blocks == len(part)
    assert [names for _, names in copies.told] == [CHAINS[0][6:], CHAINS[0][:2], CHAINS[0][3:5]]
