"""Which nodes a chain's blocks are asked from and written to, in the order that all clients compute alike."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from covey.clock import Clock
from covey.net.kv.node import ChannelSource, Node, StoreNode
from covey.policy.placement import Site, rank
from covey.policy.ring import sites_of
from covey.types.ids import BlockHash, NamespaceId, WorkerId
from covey.types.kv_state import RingVersion


@dataclass(frozen=True, slots=True, kw_only=True)
class RingSettings:
    """How a client goes through the nodes."""

    timeout_s: float = 1.0
    stall_s: float = 2.0
    nodes_tried: int = 2
    roots_max: int = 65_536
    settling_s: float = 30.0
    """How long after a change of the ring, or a node's silence, blocks are also looked for where they were before."""


def no_ring() -> None:
    """What stands for the agreed ring where there is none: the nodes of the moment own the blocks."""


class Ring:
    """The nodes as one client sees them, and the roots of the chains that it has met."""

    def __init__(
        self,
        nodes: Callable[[], Sequence[StoreNode]],
        channels: ChannelSource,
        *,
        clock: Clock,
        boot_id: str,
        agreed: Callable[[], RingVersion | None] = no_ring,
        settings: RingSettings | None = None,
    ) -> None:
        """`nodes` returns who is there now, `agreed` who owns blocks; an empty `boot_id` never maps arenas."""
        self._settings = settings or RingSettings()
        self._list = nodes
        self._agreed = agreed
        self._channels = channels
        self._clock = clock
        self._boot_id = boot_id
        self._nodes: dict[WorkerId, Node] = {}
        self._roots: OrderedDict[tuple[NamespaceId, BlockHash], BlockHash] = OrderedDict()
        self._current: RingVersion | None = None
        self._before: RingVersion | None = None
        self._settled_at = 0.0

    @property
    def version(self) -> RingVersion | None:
        """The agreed ring that this client goes by."""
        self._follow()
        return self._current

    @property
    def is_settled(self) -> bool:
        """Whether a miss at the first node that answers is a miss everywhere."""
        self._follow()
        return self._clock.now() >= self._settled_at

    def unsettle(self) -> None:
        """A node did not answer: for a while others may hold what should be there."""
        self._settled_at = self._clock.now() + self._settings.settling_s

    def writers(self, namespace: NamespaceId, root: BlockHash) -> list[Node]:
        """Return the nodes that may be asked to take a chain, the best first; draining ones are not among them."""
        present = self._present()
        open_ = {worker: where for worker, where in present.items() if not where.draining}
        return [self._node(open_[worker]) for worker in self._order(namespace, root, open_)[: self._tried()]]

    def readers(self, namespace: NamespaceId, root: BlockHash) -> list[Node]:
        """Return the nodes that may hold a chain, the best first: its replicas, then those before the last change."""
        present = self._present()
        order = self._order(namespace, root, present)[: self._tried()]
        if self._before is not None and not self.is_settled:
            former = rank(sites_of(self._before), namespace, root, replicas=self._before.replicas)
            order += [w for w in former[: self._tried()] if w in present and w not in order]
        return [self._node(present[worker]) for worker in order]

    def node(self, worker: WorkerId) -> Node | None:
        """Return one node by name, None when it is not there."""
        where = self._present().get(worker)
        return None if where is None else self._node(where)

    def root(self, namespace: NamespaceId, name: BlockHash) -> BlockHash:
        """Return the first block of a chain that this client has met, else the block itself."""
        return self._roots.get((namespace, name), name)

    def remember(self, namespace: NamespaceId, names: Iterable[BlockHash], root: BlockHash) -> None:
        """Keep in mind that blocks belong to the chain of `root`."""
        for name in names:
            self._roots[namespace, name] = root
            self._roots.move_to_end((namespace, name))
        while len(self._roots) > self._settings.roots_max:
            self._roots.popitem(last=False)

    def _tried(self) -> int:
        return max(self._settings.nodes_tried, self._current.replicas if self._current else 1)

    def _order(self, namespace: NamespaceId, root: BlockHash, usable: Mapping[WorkerId, StoreNode]) -> list[WorkerId]:
        """Rank the ring's members that are there; without a ring, or with none of it there, whoever is."""
        if self._current is not None:
            order = rank(sites_of(self._current), namespace, root, replicas=self._current.replicas)
            found = [worker for worker in order if worker in usable]
            if found:
                return found
        sites = [Site(worker=w.worker, weight=w.capacity_bytes, host=w.host) for w in usable.values()]
        return list(rank(sites, namespace, root))

    def _present(self) -> dict[WorkerId, StoreNode]:
        self._follow()
        present = {where.worker: where for where in self._list()}
        for worker in self._nodes.keys() - present.keys():
            del self._nodes[worker]
        return present

    def _follow(self) -> None:
        agreed = self._agreed()
        if agreed is not None and agreed != self._current:
            if self._current is not None:
                self._before = self._current
                self.unsettle()
            self._current = agreed

    def _node(self, where: StoreNode) -> Node:
        node = self._nodes.get(where.worker)
        if node is None or node.where.address != where.address:
            node = self._nodes[where.worker] = Node(
                where,
                self._channels,
                self._clock,
                boot_id=self._boot_id,
                timeout_s=self._settings.timeout_s,
                stall_s=self._settings.stall_s,
            )
        return node
