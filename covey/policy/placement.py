"""Where a chain of blocks lives: weighted rendezvous hashing, so that a join or leave moves only what it must."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from hashlib import blake2b

from covey.types.ids import BlockHash, NamespaceId, WorkerId


@dataclass(frozen=True, slots=True, kw_only=True)
class Site:
    """A node that can hold blocks; `weight` is its capacity in any unit that all nodes share."""

    worker: WorkerId
    weight: float


def rank(sites: Iterable[Site], namespace: NamespaceId, root: BlockHash) -> tuple[WorkerId, ...]:
    """Order nodes by preference for the chain whose first block is `root`; the first one owns it.

    A whole chain has one owner, so that a prefix is found with one call. Each node draws an independent
    number from the key; the largest `-weight / ln(draw)` wins, which gives each node a share of chains
    proportional to its weight (Schindelhauer and Schomaker, "Weighted Distributed Hash Tables", 2005).
    Nodes without weight hold nothing.
    """
    scored = [(_score(site, namespace, root), site.worker) for site in sites if site.weight > 0]
    return tuple(worker for _, worker in sorted(scored, reverse=True))


def _score(site: Site, namespace: NamespaceId, root: BlockHash) -> float:
    digest = blake2b(site.worker.encode(), digest_size=8, key=namespace[:32], person=b"covey-place")
    digest.update(root)
    draw = (int.from_bytes(digest.digest(), "little") + 1) / (2**64 + 1)  # in (0, 1)
    return -site.weight / math.log(draw) if draw < 1 else math.inf
