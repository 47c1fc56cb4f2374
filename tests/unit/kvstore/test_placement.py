"""Rendezvous placement: shares follow weights, and a join or leave moves only what it must."""

from __future__ import annotations

from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st

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


NODES = st.lists(st.tuples(st.floats(0.25, 8.0), st.sampled_from(["h0", "h1", "h2", ""])), min_size=1, max_size=7).map(
    lambda drawn: [Site(worker=WorkerId(f"kv-{i}"), weight=weight, host=host) for i, (weight, host) in enumerate(drawn)]
)


@settings(max_examples=60, deadline=None)
@given(nodes=NODES, joins=st.floats(0.25, 8.0), host=st.sampled_from(["h0", "h3", ""]), replicas=st.integers(1, 4))
def test_a_join_moves_blocks_only_to_the_one_that_joins(
    nodes: list[Site], joins: float, host: str, replicas: int
) -> None:
    new = Site(worker=WorkerId("new"), weight=joins, host=host)
    for root in ROOTS[:40]:
        before = rank(nodes, NS, root, replicas=replicas)
        after = rank([*nodes, new], NS, root, replicas=replicas)
        assert set(after) == {*before, new.worker}
        assert set(after[:replicas]) - set(before[:replicas]) <= {new.worker}
        assert before[0] == after[0] or after[0] == new.worker


@settings(max_examples=60, deadline=None)
@given(nodes=NODES, replicas=st.integers(1, 4))
def test_replicas_are_on_as_many_hosts_as_there_are(nodes: list[Site], replicas: int) -> None:
    hosts = {site.worker: site.host or site.worker for site in nodes}
    for root in ROOTS[:40]:
        order = rank(nodes, NS, root, replicas=replicas)
        chosen = order[:replicas]
        assert order[0] == rank(nodes, NS, root)[0], "replicas do not change the owner"
        assert len(chosen) == min(replicas, len(nodes))
        assert len({hosts[worker] for worker in chosen}) == min(replicas, len(set(hosts.values())))


def test_a_fourth_node_takes_at_most_27_of_100_blocks_of_chains_of_any_length() -> None:
    """Whole chains move, so the share of blocks varies more than that of chains."""
    before, after = owners(sites(1, 1, 1)), owners(sites(1, 1, 1, 1))
    lengths = [1 + (i * 7919) % 100 for i in range(len(ROOTS))]
    moved = sum(n for old, new, n in zip(before, after, lengths, strict=True) if old != new)
    assert 0.23 <= moved / sum(lengths) <= 0.27
