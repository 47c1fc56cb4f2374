"""Where a chain of blocks lives: weighted rendezvous hashing, so that a join or leave moves only what it must."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from hashlib import blake2b

from covey.types.ids import BlockHash, NamespaceId, WorkerId


@dataclass(frozen=True, slots=True, kw_only=True)
class Site:
    """A node that can hold blocks; `weight` is its capacity in any unit that all nodes share.

    Sites of one `host` fail together; an empty one is a host of its own.
    """

    worker: WorkerId
    weight: float
    host: str = ""


def rank(sites: Iterable[Site], namespace: NamespaceId, root: BlockHash, *, replicas: int = 1) -> tuple[WorkerId, ...]:
    """Order nodes by preference for the chain whose first block is `root`: its owner, its other replicas, the rest.

    A whole chain has one owner, so that a prefix is found with one call. Each node draws an independent
    number from the key; the largest `-weight / ln(draw)` wins, which gives each node a share of chains
    proportional to its weight (Schindelhauer and Schomaker, "Weighted Distributed Hash Tables", 2005).
    The first `replicas` nodes are on different hosts as far as there are so many. A node that joins only pushes
    others out of that set, one that leaves only lets others in. Nodes without weight hold nothing.
    """
    scored = sorted(
        ((_score(site, namespace, root), site.worker, site.host) for site in sites if site.weight > 0), reverse=True
    )
    chosen = _spread([(worker, host) for _, worker, host in scored], replicas) if replicas > 1 else []
    return (*chosen, *(worker for _, worker, _ in scored if worker not in chosen))


def _spread(order: Sequence[tuple[WorkerId, str]], count: int) -> list[WorkerId]:
    """Return the first `count`, preferring hosts that none before has; in the given order."""
    hosts: set[str] = set()
    apart: list[WorkerId] = []
    for worker, host in order:
        if not host or host not in hosts:
            hosts.add(host)
            apart.append(worker)
    together = [worker for worker, _ in order if worker not in apart]
    chosen = set((apart + together)[:count])
    return [worker for worker, _ in order if worker in chosen]


def _score(site: Site, namespace: NamespaceId, root: BlockHash) -> float:
    digest = blake2b(site.worker.encode(), digest_size=8, key=namespace[:32], person=b"covey-place")
    digest.update(root)
    draw = (int.from_bytes(digest.digest(), "little") + 1) / (2**64 + 1)  # in (0, 1)
    return -site.weight / math.log(draw) if draw < 1 else math.inf
