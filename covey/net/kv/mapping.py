"""Another process's arena, mapped: blocks are read and written in place, without a copy through the service."""

from __future__ import annotations

import mmap
import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace

from covey.errors import DataCorrupt, Unavailable
from covey.net.kv.copying import copy_in, copy_out, digest
from covey.net.kv.reading import Layers
from covey.policy.slot import SlotHeader, SlotState, header_bytes, payload_offset, slot_bytes
from covey.types.block import BlockLocation, BlockShape
from covey.types.ids import NamespaceId
from covey.types.kv import StoreInfo

MADV_POPULATE_WRITE = 23
"""Linux 5.14; the mmap module does not name it."""


class ArenaMapping:
    """A store's arena in this process: one read-only mapping, and a writable one made at the first write."""

    def __init__(self, path: str, size_bytes: int) -> None:
        self._path = path
        self._size_bytes = size_bytes
        self._read = _map(path, size_bytes, mmap.PROT_READ)
        self._write: mmap.mmap | None = None
        self._faulted: set[tuple[int, int]] = set()  # bounded by the slots that fit

    @classmethod
    def open(cls, info: StoreInfo, boot_id: str) -> ArenaMapping | None:
        """Map the arena if the store runs on this host and its files can be opened here; else None.

        The boot ids must agree and the probe file must hold the store's nonce: another container of this
        host may have a file of the same name.
        """
        if info.boot_id != boot_id:
            return None
        try:
            if _read_probe(info.probe_path) != info.probe_nonce:
                return None
            return cls(info.arena_path, info.arena_bytes)
        except (OSError, ValueError):
            return None

    def slot(self, location: BlockLocation, namespace: NamespaceId, shape: BlockShape) -> SlotView:
        """Return a leased block's slot. Raises `DataCorrupt` when it does not hold that block."""
        end = location.offset + slot_bytes(shape)
        if location.offset < 0 or end > self._size_bytes:
            raise DataCorrupt("the slot lies outside the arena")
        return SlotView(memoryview(self._read)[location.offset : end], location, namespace, shape)

    def write(self, offset: int, shape: BlockShape, source: memoryview) -> tuple[int, ...]:
        """Copy a block into a granted slot's payload; return its checksums, for the commit."""
        if self._write is None:
            self._write = _map(self._path, self._size_bytes, mmap.PROT_READ | mmap.PROT_WRITE)
        start = offset + payload_offset(shape)
        if offset < 0 or offset + slot_bytes(shape) > self._size_bytes:
            raise Unavailable("the store granted a slot outside its arena")
        self._fault_in(offset, slot_bytes(shape))
        with memoryview(self._write) as arena, arena[start : start + shape.size_bytes] as slot:
            return copy_in(slot, source, shape)

    def _fault_in(self, offset: int, size_bytes: int) -> None:
        """Map a slot's pages in one call at its first use: a third of the cost of a fault for each."""
        if self._write is not None and (offset, size_bytes) not in self._faulted:
            self._faulted.add((offset, size_bytes))
            with suppress(OSError):  # an older kernel: the copy faults them in one by one
                self._write.madvise(MADV_POPULATE_WRITE, offset, size_bytes)


class SlotView:
    """One committed block in a mapped arena."""

    def __init__(self, slot: memoryview, location: BlockLocation, namespace: NamespaceId, shape: BlockShape) -> None:
        """Raises `DataCorrupt` when the slot does not hold the block."""
        self._slot = slot
        self._header_bytes = header_bytes(shape)
        self._shape = shape
        self._header = bytes(slot[: self._header_bytes])
        self._sums = checked_header(self._header, location, namespace, shape).checksums

    def read(self, layers: Layers, into: memoryview) -> None:
        """Copy layers out and verify the copy; then see that the slot still is the one that was leased.

        Raises:
            DataCorrupt: checksum or generation do not fit; the message says which.
        """
        source = self._slot[payload_offset(self._shape) :][layers.within(self._shape)]
        if not copy_out(source, into, self._sums[layers.first : layers.last]):
            raise DataCorrupt("a layer does not have its checksum")
        if self._slot[: self._header_bytes] != self._header:
            raise DataCorrupt("the slot was used again during the copy")


def stored_shape(location: BlockLocation, shape: BlockShape) -> BlockShape:
    """Return the geometry of a block's payload as it is encoded."""
    return replace(shape, size_bytes=location.size_bytes) if location.size_bytes else shape


def checked_header(data: bytes, location: BlockLocation, namespace: NamespaceId, shape: BlockShape) -> SlotHeader:
    """Return the header if it is exactly the one that the index vouches for. Raises `DataCorrupt`."""
    if digest(data) != location.digest:
        raise DataCorrupt("the header of a block is damaged")
    header = SlotHeader.unpack(data)
    expected = (SlotState.COMMITTED, location.generation, namespace, location.hash, shape, location.codec)
    found = (header.state, header.generation, header.namespace, header.hash, header.shape, header.codec)
    if found != expected:
        raise DataCorrupt("the slot holds another block")
    return header


def rebuilt_header(
    location: BlockLocation, namespace: NamespaceId, shape: BlockShape, checksums: Sequence[int]
) -> bytes:
    """Return the bytes that a committed slot's header must have if its block has these checksums."""
    return SlotHeader(
        state=SlotState.COMMITTED,
        generation=location.generation,
        namespace=namespace,
        hash=location.hash,
        shape=shape,
        checksums=tuple(checksums),
        codec=location.codec,
    ).pack()


def _map(path: str, size_bytes: int, protection: int) -> mmap.mmap:
    writable = bool(protection & mmap.PROT_WRITE)
    fd = os.open(path, (os.O_RDWR if writable else os.O_RDONLY) | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        return mmap.mmap(fd, size_bytes, mmap.MAP_SHARED, protection)
    finally:
        os.close(fd)


def _read_probe(path: str) -> str:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        with mmap.mmap(fd, 0, mmap.MAP_SHARED, mmap.PROT_READ) as probe:
            return bytes(probe[:128]).decode("ascii", "replace")
    finally:
        os.close(fd)
