"""Rendezvous placement: shares follow weights, and a join or leave moves only what it must."""

from __future__ import annotations

from collections import Counter

from covey.policy.placement import Site, rank
from covey.types.ids import BlockHash, NamespaceId, WorkerId

NS = NamespaceId(b"n" * 16)
ROOTS = [BlockHash(i.to_bytes(16, "big")) for i in range(8000)]


def sites(*weights: float) -> list[Site]:
    return [Site(worker=WorkerId(f"kv-{i}"), weight=weight) for i, weight in enumerate(weights)]


def owners(nodes: list[Site]) -> list[WorkerId]:
    return [rank(nodes, NS, root)[0] for root in ROOTS]


def test_shares_follow_weights() -> None:
    counts = Counter(owners(sites(1, 2, 1)))
    assert abs(counts[WorkerId("kv-1")] / len(ROOTS) - 0.5) < 0.03
    assert abs(counts[WorkerId("kv-0")] / len(ROOTS) - 0.25) < 0.03


def test_a_fourth_node_takes_its_share_and_moves_nothing_else() -> None:
    before, after = owners(sites(1, 1, 1)), owners(sites(1, 1, 1, 1))
    moved = [new for old, new in zip(before, after, strict=True) if old != new]
    assert set(moved) == {WorkerId("kv-3")}
    assert 0.23 < len(moved) / len(ROOTS) < 0.27


def test_a_lost_node_hands_its_chains_to_the_next_in_order() -> None:
    nodes = sites(1, 1, 1)
    for root in ROOTS[:200]:
        order = rank(nodes, NS, root)
        assert rank([s for s in nodes if s.worker != order[0]], NS, root) == order[1:]


def test_a_node_without_room_holds_nothing() -> None:
    assert rank(sites(0, 0), NS, ROOTS[0]) == ()
