"""Writes to a store in two phases, and new versions of what is there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from covey.errors import CoveyError, FailedPrecondition, Fenced, InvalidArgument, Miss, NoSpace, QuotaExceeded
from covey.policy.block_columns import LOST, NONE, BlockState, keys_of
from covey.policy.placed import Placed, placed
from covey.policy.rights import STORE, Holding, Right, as_grant
from covey.policy.shelf import RAW, Shelf
from covey.policy.slot import slot_bytes
from covey.policy.spaces import Space
from covey.policy.store_books import StoreBooks
from covey.types.block import BlockCodec, BlockShape
from covey.types.ids import BlockHash, LeaseId, NamespaceId, TenantId
from covey.types.kv import CommitRequest, Grant, GrantStatus, LeaseGrant, ReserveReply, ReserveRequest
from covey.types.kv_state import KvEventKind


@dataclass(slots=True, eq=False)
class _Reservation:
    request: ReserveRequest
    shape: BlockShape
    """Of what will be written."""
    space: Space
    holding: Holding
    rows: list[int]
    """Where each block was when the reservation began, or `NONE`."""
    keys: list[tuple[int, int]]
    now: float


class Writing:
    """Reservations, commits, drafts and replacements over the books of a store."""

    def __init__(self, books: StoreBooks) -> None:
        self._books = books
        self._shelf = books.shelf

    def reserve(self, request: ReserveRequest, now: float) -> ReserveReply:
        """See `StoreIndex.reserve`."""
        shelf, count, shape = self._shelf, len(request.blocks), _written(request)
        if slot_bytes(shape) * count > shelf.arena.capacity_bytes:
            raise NoSpace("these blocks are larger than the whole store")
        space = shelf.spaces.of(request.namespace, request.shape)
        keys = keys_of([block.hash for block in request.blocks], "blocks")
        lease, holding = self._books.grant(Right.WRITE, request.tenant, request.owner, request.ttl_s, count + 1, now)
        try:
            rows = shelf.find(space, keys)
            stored = rows[(rows != NONE) & (shelf.columns.state[rows] == BlockState.COMMITTED)]
            holding.rows = np.unique(stored)
            shelf.hold(holding.rows, now)
            writing = _Reservation(request, shape, space, holding, rows.tolist(), keys.tolist(), now)
            pending: set[BlockHash] = set()
            grants = tuple([self._take(writing, i, pending) for i in range(count)])
        except CoveyError:
            self._books.end(lease.id, now)
            raise
        return ReserveReply(lease=as_grant(lease, now), grants=grants)

    def writable(self, lease_id: LeaseId, name: BlockHash, now: float, *, tenant: TenantId) -> Placed:
        """See `StoreIndex.writable`."""
        holding = self._books.rights.get(lease_id, tenant, now)
        row = holding.reserved.get(name, holding.drafts.get(name, NONE))
        if row == NONE:
            raise Fenced("this lease has no such slot to fill", field="hash")
        return placed(self._shelf, row)

    def can_commit(self, request: CommitRequest, now: float) -> tuple[Placed, ...]:
        """See `StoreIndex.can_commit`."""
        self._books.rights.authorize(request.lease, request.tenant, request.epoch, now)
        holding = self._books.rights.get(request.lease, request.tenant, now)
        columns = self._shelf.columns
        names = {item.hash for item in request.blocks}
        kept = frozenset() if names <= holding.reserved.keys() else frozenset(columns.names(holding.every()))
        ready: dict[int, None] = {}
        for i, item in enumerate(request.blocks):
            row = holding.reserved.get(item.hash, holding.drafts.get(item.hash, NONE))
            if row == NONE:
                if item.hash not in kept:
                    raise InvalidArgument("this block was not granted to the lease", field=f"blocks[{i}].hash")
                continue
            layers = self._shelf.space_of(row).shape.layers
            if len(item.checksums) != layers:
                raise InvalidArgument(f"a block has {layers} checksums", field=f"blocks[{i}].checksums")
            if columns.at_state[row] == BlockState.DRAFT:
                ready[row] = None
                continue
            parent = columns.at_parent[row]
            visible = parent == NONE or parent in ready or columns.at_state[parent] == BlockState.COMMITTED
            if parent == LOST or not visible:
                raise FailedPrecondition("the block before it is not stored", field=f"blocks[{i}].hash")
            ready[row] = None
        return tuple(placed(self._shelf, row) for row in ready)

    def commit(self, lease_id: LeaseId, digests: Mapping[BlockHash, int], now: float) -> None:
        """See `StoreIndex.commit`."""
        holding = self._books.rights.get(lease_id, STORE, now)
        for name in digests.keys() & holding.drafts.keys():
            self._exchange(holding, holding.drafts.pop(name), digests[name], now)
        fresh = {holding.reserved.pop(name): digest for name, digest in digests.items() if name in holding.reserved}
        if not fresh:
            return
        done = list(fresh)
        for row, digest in fresh.items():
            self._shelf.seal(row, digest)
            holding.more[row] = None
        self._shelf.hold(np.array(done, np.int32), now)
        self._shelf.changes.note(KvEventKind.STORED, done, self._shelf.space_of(done[0]).namespace)

    def draft(
        self, namespace: NamespaceId, sizes: Mapping[BlockHash, int], codec: BlockCodec, *, owner: str, ttl_s: float,
        now: float,
    ) -> tuple[LeaseGrant, tuple[Placed, ...]]:  # fmt: skip
        """See `StoreIndex.draft`."""
        lease, holding = self._books.grant(Right.WRITE, STORE, owner, ttl_s, len(sizes), now)
        try:
            for name, size_bytes in sizes.items():
                row = next(iter(self._books.shared(namespace, (name,))), NONE)
                if row == NONE:
                    raise Miss("this block is not stored", field="hashes")
                draft = self._shelf.draft(row, size_bytes, codec, now)
                if draft == NONE:
                    raise self._no_space(now)
                holding.drafts[name] = draft
        except CoveyError:
            self._books.end(lease.id, now)
            raise
        return as_grant(lease, now), tuple(placed(self._shelf, row) for row in holding.drafts.values())

    def replace(self, lease_id: LeaseId, digests: Mapping[BlockHash, int], now: float) -> int:
        """See `StoreIndex.replace`."""
        drafts = self._books.rights.get(lease_id, STORE, now).drafts
        if not digests.keys() <= drafts.keys():
            raise Fenced("this lease has no such slot to fill", field="hash")
        return sum(self._swap(drafts.pop(name), digest) != NONE for name, digest in digests.items())

    def _swap(self, draft: int, digest: int) -> int:
        """Put a draft in its place, with the pins of what was there; return that row, or `NONE` when it went."""
        old = self._shelf.swap(draft, digest)
        if old == NONE:
            self._shelf.discard(draft, cool_until=None)
            return NONE
        if self._shelf.columns.at_pins[old]:
            self._shelf.carry_pins(old, draft, self._books.rights.carry_pins(old, draft))
        self._shelf.settle(old)
        self._shelf.settle(draft)
        return old

    def _exchange(self, holding: Holding, draft: int, digest: int, now: float) -> None:
        """Put a writer's exact version in the place of a lossy one that its lease keeps, and keep that instead."""
        old = self._swap(draft, digest)
        if old == NONE:
            return
        self._shelf.hold(np.array([draft], np.int32), now)
        holding.rows = np.where(holding.rows == old, np.int32(draft), holding.rows)
        self._shelf.unhold(np.array([old], np.int32))

    def _take(self, writing: _Reservation, i: int, pending: set[BlockHash]) -> Grant:
        key, holding, row = writing.request.blocks[i], writing.holding, writing.rows[i]
        columns = self._shelf.columns
        if key.hash in holding.reserved or key.hash in holding.drafts or key.hash in pending:
            raise InvalidArgument("this block is named twice", field=f"blocks[{i}].hash")
        if row != NONE and columns.at_state[row] == BlockState.COMMITTED:
            exact = self._exact(writing, key.hash, row)
            if exact != NONE:
                return _granted(self._shelf, key.hash, GrantStatus.GRANTED, exact)
            return _granted(self._shelf, key.hash, GrantStatus.EXISTS, row)
        parent = self._parent(writing, i)
        foreign = parent != NONE and columns.at_state[parent] == BlockState.RESERVED
        if row != NONE or (foreign and key.parent not in holding.reserved) or key.parent in pending:
            pending.add(key.hash)
            return Grant(hash=key.hash, status=GrantStatus.PENDING)
        if key.parent and parent == NONE:
            raise Miss("the block that it grows from is not stored", field=f"blocks[{i}].parent")
        if parent != NONE and columns.at_private[parent] and not writing.request.private:
            raise InvalidArgument("a shared block cannot grow from a private one", field=f"blocks[{i}].parent")
        if parent != NONE and columns.at_state[parent] == BlockState.COMMITTED:
            self._keep(holding, parent, writing.now)
        row = self._add(writing, i, parent)
        holding.reserved[key.hash] = row
        return _granted(self._shelf, key.hash, GrantStatus.GRANTED, row)

    def _exact(self, writing: _Reservation, name: BlockHash, row: int) -> int:
        """Take a slot for exact numbers in the place of a lossy block; `NONE` when it is not, or there is no room."""
        if self._shelf.columns.at_codec[row] == RAW or writing.request.codec is not BlockCodec.RAW:
            return NONE
        try:
            draft = self._shelf.draft(row, writing.request.shape.size_bytes, BlockCodec.RAW, writing.now)
        except QuotaExceeded:
            return NONE
        if draft != NONE:
            writing.holding.drafts[name] = draft
        return draft

    def _parent(self, writing: _Reservation, i: int) -> int:
        key = writing.request.blocks[i]
        if not key.parent:
            return NONE
        if i and key.parent == writing.request.blocks[i - 1].hash:
            return writing.holding.reserved.get(key.parent, writing.rows[i - 1])
        return self._shelf.find_one(writing.space, key.parent, f"blocks[{i}].parent")

    def _add(self, writing: _Reservation, i: int, parent: int) -> int:
        request, now, rights = writing.request, writing.now, self._books.rights
        while True:
            try:
                row = self._shelf.add(
                    writing.space, writing.keys[i], parent, shape=writing.shape, codec=request.codec,
                    tenant=request.tenant, private=request.private, wanted=len(request.blocks) - i, now=now,
                )  # fmt: skip
            except QuotaExceeded as error:
                pin = rights.soft_pin(request.tenant)
                if pin is None:
                    error.retry_after_ms = self._books.retry_after_ms(now)
                    raise
            else:
                if row != NONE:
                    return row
                pin = rights.soft_pin()
                if pin is None:
                    raise self._no_space(now)
            self._books.end(pin, now)

    def _keep(self, holding: Holding, row: int, now: float) -> None:
        if row in holding.more or (holding.rows == row).any():
            return
        self._shelf.hold(np.array([row], np.int32), now)
        holding.more[row] = None

    def _no_space(self, now: float) -> NoSpace:
        return NoSpace("every block is leased or pinned", retry_after_ms=self._books.retry_after_ms(now))


def _written(request: ReserveRequest) -> BlockShape:
    """The shape of the payloads that will be written. Raises `InvalidArgument`."""
    if (request.codec is BlockCodec.RAW) != (request.encoded_bytes == 0):
        raise InvalidArgument("a codec and the size that it makes come together", field="encoded_bytes")
    return replace(request.shape, size_bytes=request.encoded_bytes) if request.encoded_bytes else request.shape


def _granted(shelf: Shelf, name: BlockHash, status: GrantStatus, row: int) -> Grant:
    columns = shelf.columns
    return Grant(hash=name, status=status, offset=columns.offset(row), generation=columns.at_generation[row])
