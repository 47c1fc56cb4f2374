"""The names of a sequence's blocks: hash chains over its tokens, along the scopes that the gateway gave (design §7)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise

from covey.errors import InvalidArgument
from covey.policy.identity import chain, tail_key
from covey.policy.prefix_cache import CacheKey
from covey.types.generate import HandoverTicket, KvScope
from covey.types.ids import BlockHash, NamespaceId, RequestId
from covey.types.kv import BlockKey


@dataclass(frozen=True, slots=True, kw_only=True)
class Stretch:
    """Consecutive blocks of one namespace: `keys` belong to the sequence's blocks from `first` on."""

    namespace: NamespaceId
    first: int
    keys: tuple[BlockKey, ...]


class BlockChain:
    """Names full blocks as tokens are added; a block's name is fixed by all tokens up to its end."""

    def __init__(self, scopes: Sequence[KvScope], block_size: int) -> None:
        """The last scope covers the rest. Raises InvalidArgument (`scopes`) when an earlier one has no length."""
        if not scopes:
            raise InvalidArgument("at least one scope is needed", field="scopes")
        if any(scope.blocks == 0 for scope in scopes[:-1]):
            raise InvalidArgument("only the last scope may cover the rest of the prompt", field="scopes")
        self._scopes = tuple(scopes)
        self._block_size = block_size
        self.keys: list[CacheKey] = []
        """Names of the full blocks, in order."""
        self._hashes: list[BlockKey] = []

    def extend(self, token_ids: Sequence[int]) -> None:
        """Name the blocks that are full now; `token_ids` are all tokens, of which earlier ones have not changed."""
        size = self._block_size
        for index in range(len(self.keys), len(token_ids) // size):
            scope, is_first = self._scope_of(index)
            root = scope.chain_root if is_first else self._hashes[-1].hash
            (name,) = chain(root, token_ids[index * size : (index + 1) * size], size)
            self.keys.append((scope.namespace, name))
            self._hashes.append(BlockKey(hash=name, parent=BlockHash(b"") if is_first else BlockHash(root)))

    def parent(self, index: int) -> CacheKey | None:
        """The name of the block that block `index` grows from, for the worker's own cache."""
        return self.keys[index - 1] if index else None

    def tail(self, token_ids: Sequence[int], request: RequestId, index: int) -> tuple[NamespaceId, BlockKey]:
        """Name of block `index` while it is unfinished and holds `token_ids`."""
        scope, is_first = self._scope_of(index)
        root = scope.chain_root if is_first else self._hashes[index - 1].hash
        parent = BlockHash(b"") if is_first else BlockHash(root)
        return scope.namespace, BlockKey(hash=tail_key(root, token_ids, request), parent=parent)

    def stretches(self, first: int, end: int) -> Iterator[Stretch]:
        """Blocks `first` to `end`, divided where the namespace changes."""
        numbered = ((index, *self.keys[index], self._hashes[index]) for index in range(first, end))
        for namespace, group in groupby(numbered, key=lambda item: item[1]):
            items = list(group)
            yield Stretch(namespace=namespace, first=items[0][0], keys=tuple(item[3] for item in items))

    def _scope_of(self, index: int) -> tuple[KvScope, bool]:
        start = 0
        for scope in self._scopes[:-1]:
            if index < start + scope.blocks:
                return scope, index == start
            start += scope.blocks
        last = self._scopes[-1]
        return last, index == start


def named_by(ticket: HandoverTicket) -> list[CacheKey]:
    """The local names of a ticket's full blocks. Raises InvalidArgument (`ticket.scopes`) when they do not fit."""
    names: list[CacheKey] = []
    for scope in ticket.scopes:
        rest = len(ticket.hashes) - len(names)
        count = min(scope.blocks, rest) if scope.blocks else rest
        names += [(scope.namespace, name) for name in ticket.hashes[len(names) : len(names) + count]]
    if len(names) != len(ticket.hashes):
        raise InvalidArgument("the scopes do not cover the ticket's hashes", field="ticket.scopes")
    return names


def parents(names: Sequence[CacheKey]) -> list[CacheKey | None]:
    """What each block of a chain grows from."""
    return [None, *(before for before, _ in pairwise(names))]
