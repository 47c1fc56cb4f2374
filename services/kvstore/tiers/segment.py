"""One file of the disk tier: records appended one after the other, never changed but to mark one dead."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from covey.errors import DataCorrupt
from covey.policy.disk_index import Spot
from covey.policy.disk_record import (
    HEAD_BYTES_MAX,
    RECORD_ALIGN,
    Place,
    Record,
    RecordHead,
    mark_dead,
    pack_head,
    read_head,
    record_bytes,
    starts_record,
    unpack,
)
from covey.types.block import BlockCodec
from covey.types.ids import BlockHash, NamespaceId, TenantId

SUFFIX = ".kv"


@dataclass(frozen=True, slots=True)
class Found:
    """A record that a scan came upon: no more of it than the index needs, for there may be millions."""

    spot: Spot
    namespace: NamespaceId
    hash: BlockHash
    parent: BlockHash
    tenant: TenantId
    codec: BlockCodec


class Segment:
    """A file of records. Blocks the thread that uses it; `end` grows only when a record is whole."""

    def __init__(self, directory: Path, number: int, *, create: bool) -> None:
        """Open or make the file, mode 0600, for this process alone."""
        self.path = directory / f"{number:08d}{SUFFIX}"
        self.number = number
        self.damaged = 0
        """Records that the scan could not trust."""
        flags = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | (os.O_CREAT | os.O_EXCL if create else 0)
        self._fd = os.open(self.path, flags, 0o600)
        self.end = os.fstat(self._fd).st_size
        self._users = 0
        self._given_up = False

    @classmethod
    def numbers(cls, directory: Path) -> list[int]:
        """The segments in a directory, oldest first."""
        return sorted(int(path.stem) for path in directory.glob(f"*{SUFFIX}") if path.stem.isdecimal())

    def append(self, record: Record) -> Spot:
        """Write a record at the end. Raises `OSError`; then the file is as before."""
        offset = self.end
        head = pack_head(record, self._place(offset))
        size = record_bytes(head, len(record.payload))
        padding = bytes(size - len(head) - len(record.payload))
        try:
            self._write((head, record.payload, padding), offset)
        except OSError:
            os.ftruncate(self._fd, offset)
            raise
        self.end = offset + size
        return Spot(self.number, offset, size)

    def read(self, spot: Spot, namespace: NamespaceId, name: BlockHash) -> Record:
        """Return a block's record, verified. Raises `DataCorrupt`, also when the disk cannot read it."""
        return unpack(self._read(spot.offset, spot.size_bytes), namespace, name, self._place(spot.offset))

    def verify(self, spot: Spot) -> RecordHead:
        """Verify a record whose name is not known. Raises `DataCorrupt`."""
        data = self._read(spot.offset, spot.size_bytes)
        head = read_head(data, self._place(spot.offset))
        unpack(data, head.header.namespace, head.header.hash, self._place(spot.offset))
        return head

    def kill(self, offset: int) -> None:
        """Make a record one that no scan returns. A disk that takes no writes keeps it: reads verify it anyway."""
        try:
            try:
                os.pwrite(self._fd, mark_dead(self._read(offset, HEAD_BYTES_MAX)), offset)
            except DataCorrupt:
                os.pwrite(self._fd, bytes(64), offset)
        except OSError as error:
            if error.errno not in {errno.EIO, errno.EROFS, errno.ENOSPC, errno.EDQUOT}:
                raise

    def sync(self) -> None:
        """Return when everything appended is on the medium. Raises `OSError`."""
        os.fdatasync(self._fd)

    def scan(self) -> Iterator[Found]:
        """Yield live records, reading heads only; what is left over at the end, a write cut short, is cut off."""
        size = os.fstat(self._fd).st_size
        at = good = gap = 0
        while at < size:
            head = self._head(at, size)
            if head is None:
                gap += starts_record(self._read(at, RECORD_ALIGN)) or gap == 0
                at += RECORD_ALIGN
                continue
            self.damaged += gap
            gap = 0
            spot = Spot(self.number, at, -(-head.end // RECORD_ALIGN) * RECORD_ALIGN)
            at = good = at + spot.size_bytes
            if not head.dead:
                yield Found(
                    spot, head.header.namespace, head.header.hash, head.parent, head.tenant, head.header.codec
                )  # fmt: skip
        if good < size:
            self.damaged += gap
            os.ftruncate(self._fd, good)
        self.end = good

    # -- life --------------------------------------------------------------------

    def __enter__(self) -> Self:
        """Keep the file open while it is used: it may be given up meanwhile."""
        self._users += 1
        return self

    def __exit__(self, *_: object) -> None:
        self._users -= 1
        self._close_if_unused()

    def give_up(self, *, remove: bool) -> None:
        """Close, once nobody uses it, and remove the file at once if it is to go."""
        if remove:
            self.path.unlink(missing_ok=True)
        self._given_up = True
        self._close_if_unused()

    def _close_if_unused(self) -> None:
        if self._given_up and not self._users and self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    # -- inside ------------------------------------------------------------------

    def _head(self, at: int, size: int) -> RecordHead | None:
        for length in (RECORD_ALIGN, HEAD_BYTES_MAX):
            try:
                head = read_head(self._read(at, length), self._place(at))
            except DataCorrupt:
                continue
            return head if at + head.end <= size else None
        return None

    def _place(self, offset: int) -> Place:
        return self.number << 32 | offset // RECORD_ALIGN

    def _read(self, offset: int, size: int) -> bytes:
        try:
            return os.pread(self._fd, size, offset)
        except OSError as error:
            raise DataCorrupt(f"the disk cannot read {self.path.name}: {error.strerror}") from error

    def _write(self, parts: tuple[bytes | memoryview, ...], offset: int) -> None:
        views = [memoryview(part) for part in parts if len(part)]
        while views:
            written = os.pwritev(self._fd, views, offset)
            if not written:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            offset += written
            while views and written >= len(views[0]):
                written -= len(views.pop(0))
            if views:
                views[0] = views[0][written:]


def sync_directory(path: Path) -> None:
    """Make names created in a directory survive a power loss."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
