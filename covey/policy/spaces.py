"""The namespaces that have blocks in a store, by id and by the number that columns hold."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from covey.errors import LayoutMismatch
from covey.policy.block_columns import NONE
from covey.policy.slot import slot_bytes
from covey.types.block import BlockShape
from covey.types.ids import NamespaceId


@dataclass(slots=True, eq=False)
class Space:
    """One namespace: all its blocks have one geometry, encoded ones aside. `rows` counts its rows in any state."""

    namespace: NamespaceId
    shape: BlockShape
    slot_bytes: int
    number: int = NONE
    rows: int = 0


class Spaces:
    """Namespaces come with their first row and go with their last: there are never more than blocks."""

    def __init__(self) -> None:
        self._by_id: dict[NamespaceId, Space] = {}
        self._by_number: list[Space | None] = []
        self._free: list[int] = []

    def __len__(self) -> int:
        return len(self._by_id)

    def __getitem__(self, number: int) -> Space:
        space = self._by_number[number]
        assert space is not None, "a block without its namespace"
        return space

    def __iter__(self) -> Iterator[Space]:
        return iter(self._by_id.values())

    def get(self, namespace: NamespaceId) -> Space | None:
        return self._by_id.get(namespace)

    def of(self, namespace: NamespaceId, shape: BlockShape) -> Space:
        """Return a namespace, a new one if it has no blocks. Raises `LayoutMismatch` and `InvalidArgument`."""
        space = self._by_id.get(namespace)
        if space is None:
            return Space(namespace=namespace, shape=shape, slot_bytes=slot_bytes(shape))
        if space.shape != shape:
            raise LayoutMismatch(
                f"blocks of this namespace have {space.shape.size_bytes} bytes in {space.shape.layers} layers",
                field="shape",
            )
        return space

    def gain(self, space: Space) -> int:
        """Count one more row and return the number for it."""
        if space.number == NONE:
            space.number = self._free.pop() if self._free else len(self._by_number)
            if space.number == len(self._by_number):
                self._by_number.append(space)
            else:
                self._by_number[space.number] = space
            self._by_id[space.namespace] = space
        space.rows += 1
        return space.number

    def lose(self, space: Space) -> None:
        """Count one row less."""
        space.rows -= 1
        if not space.rows:
            del self._by_id[space.namespace]
            self._by_number[space.number] = None
            self._free.append(space.number)
            space.number = NONE
