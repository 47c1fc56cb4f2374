"""What watchers of a store are told: which shared blocks came, went or changed, in order."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from covey.policy.block_columns import BlockColumns
from covey.types.ids import BlockHash, NamespaceId
from covey.types.kv_state import KvEventKind


@dataclass(frozen=True, slots=True, kw_only=True)
class IndexChange:
    """One kind of change to some blocks of a namespace; private blocks never appear here."""

    kind: KvEventKind
    namespace: NamespaceId
    hashes: tuple[BlockHash, ...]


class Changes:
    """Changes since the last `drain`; like ones that follow each other are told as one."""

    def __init__(self, columns: BlockColumns) -> None:
        self._columns = columns
        self._noted: list[tuple[KvEventKind, NamespaceId, list[BlockHash]]] = []

    def note(self, kind: KvEventKind, rows: Iterable[int], namespace: NamespaceId) -> None:
        """Note a change of blocks of one namespace, while their rows are still theirs."""
        names = [self._columns.name(row) for row in rows if not self._columns.at_private[row]]
        if not names:
            return
        if self._noted and self._noted[-1][:2] == (kind, namespace):
            self._noted[-1][2].extend(names)
        else:
            self._noted.append((kind, namespace, names))

    def drain(self) -> tuple[IndexChange, ...]:
        """Return what was noted since the last call, in order."""
        noted, self._noted = self._noted, []
        return tuple(IndexChange(kind=kind, namespace=space, hashes=tuple(names)) for kind, space, names in noted)
