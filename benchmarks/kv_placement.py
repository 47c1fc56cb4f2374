"""How many blocks move when nodes come and go, by the very function that places them."""

from __future__ import annotations

from random import Random

from covey.policy.placement import Site, rank
from covey.types.ids import BlockHash, NamespaceId, WorkerId

CHAINS = 20_000
BLOCKS_MAX = 64


def moved_share(before: int, after: int) -> float:
    """The share of blocks whose first node is another one when `before` equal nodes become `after`."""
    rng = Random(4)  # noqa: S311 - a repeatable sample
    namespace = NamespaceId(rng.randbytes(16))
    fewer, more = _sites(before), _sites(after)
    moved = total = 0
    for _ in range(CHAINS):
        root, blocks = BlockHash(rng.randbytes(16)), rng.randint(1, BLOCKS_MAX)
        total += blocks
        moved += blocks * (rank(fewer, namespace, root)[0] != rank(more, namespace, root)[0])
    return moved / total


def _sites(count: int) -> list[Site]:
    return [Site(worker=WorkerId(f"kv-{i}"), weight=1.0) for i in range(count)]
