"""Which nodes a chain's blocks are asked from and written to, in the order that all clients compute alike."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence

from covey.clock import Clock
from covey.net.kv.node import ChannelSource, Node, StoreNode
from covey.policy.placement import Site, rank
from covey.types.ids import BlockHash, NamespaceId, WorkerId


class Ring:
    """The nodes as one client sees them, and the roots of the chains that it has met."""

    def __init__(
        self,
        nodes: Callable[[], Sequence[StoreNode]],
        channels: ChannelSource,
        *,
        clock: Clock,
        boot_id: str,
        timeout_s: float,
        nodes_tried: int,
        roots_max: int,
    ) -> None:
        """`nodes` returns who is there now; an empty `boot_id` never maps arenas."""
        self._list = nodes
        self._channels = channels
        self._clock = clock
        self._boot_id = boot_id
        self._timeout_s = timeout_s
        self._nodes_tried = nodes_tried
        self._roots_max = roots_max
        self._nodes: dict[WorkerId, Node] = {}
        self._roots: OrderedDict[tuple[NamespaceId, BlockHash], BlockHash] = OrderedDict()

    def ranked(self, namespace: NamespaceId, root: BlockHash, *, writing: bool = False) -> list[Node]:
        """Return the nodes to ask for a chain, the best first; a draining one is read and not written."""
        present = {where.worker: where for where in self._list()}
        for worker in self._nodes.keys() - present.keys():
            del self._nodes[worker]
        usable = [where for where in present.values() if not (writing and where.draining)]
        sites = [Site(worker=where.worker, weight=where.capacity_bytes) for where in usable]
        order = rank(sites, namespace, root)[: self._nodes_tried]
        return [self._node(present[worker]) for worker in order]

    def root(self, namespace: NamespaceId, name: BlockHash) -> BlockHash:
        """Return the first block of a chain that this client has met, else the block itself."""
        return self._roots.get((namespace, name), name)

    def remember(self, namespace: NamespaceId, names: Iterable[BlockHash], root: BlockHash) -> None:
        """Keep in mind that blocks belong to the chain of `root`."""
        for name in names:
            self._roots[namespace, name] = root
            self._roots.move_to_end((namespace, name))
        while len(self._roots) > self._roots_max:
            self._roots.popitem(last=False)

    def _node(self, where: StoreNode) -> Node:
        node = self._nodes.get(where.worker)
        if node is None or node.where.address != where.address:
            node = self._nodes[where.worker] = Node(
                where, self._channels, self._clock, boot_id=self._boot_id, timeout_s=self._timeout_s
            )
        return node
