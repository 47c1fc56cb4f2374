"""The arena's file: private, mapped, found by processes on the host, and cleared away when its owner was killed."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import re
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from covey.config import ConfigError
from covey.errors import NoSpace
from covey.policy.arena import PAGE_BYTES

SUFFIX = ".arena"
PROBE_SUFFIX = ".probe"


class ArenaFile:
    """A mapped file of mode 0600. `probe_nonce` in `probe_path` proves to a reader that it sees the same files."""

    def __init__(self, path: Path, fd: int, size_bytes: int, nonce: str) -> None:
        self.path = path
        self.probe_path = path.with_suffix(PROBE_SUFFIX)
        self.probe_nonce = nonce
        self.size_bytes = size_bytes
        self._fd = fd
        self._map = mmap.mmap(fd, size_bytes, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
        self._backed = bytearray(-(-size_bytes // PAGE_BYTES))  # one byte a page
        self.view = memoryview(self._map)

    def is_backed(self, offset: int, size_bytes: int) -> bool:
        """Whether `back` has run for all of this range."""
        first, last = _pages(offset, size_bytes)
        return self._backed.find(0, first, last) < 0

    def back(self, offset: int, size_bytes: int) -> None:
        """Take the pages of a slot now: a full file system is an error here, and a SIGBUS for whoever writes first.

        Raises:
            NoSpace: the file system is full.
        """
        try:
            os.posix_fallocate(self._fd, offset, size_bytes)
        except OSError as error:
            if error.errno not in {errno.ENOSPC, errno.EDQUOT}:
                raise
            raise NoSpace(f"the file system of {self.path.parent} is full", retry_after_ms=1000) from error
        first, last = _pages(offset, size_bytes)
        self._backed[first:last] = b"\1" * (last - first)

    def close(self) -> None:
        """Remove the files and unmap."""
        self.path.unlink(missing_ok=True)
        self.probe_path.unlink(missing_ok=True)
        self.view.release()
        with suppress(BufferError):  # a transfer that outlived the grace period: the process ends it
            self._map.close()


def _pages(offset: int, size_bytes: int) -> tuple[int, int]:
    return offset // PAGE_BYTES, -(-(offset + size_bytes) // PAGE_BYTES)


@contextmanager
def arena_file(directory: Path, name: str, size_bytes: int) -> Iterator[ArenaFile]:
    """Own an arena for a block, after clearing those of processes that are gone.

    The owner holds a lock on its file for life, which the kernel drops however it dies: a file that can be
    locked belongs to nobody. That holds across containers, where process ids say nothing.
    """
    path = directory / f"{re.sub(r'[^A-Za-z0-9_.-]', '_', name)}{SUFFIX}"
    with _exclusive(directory):
        clear_stale(directory)
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    try:
        os.ftruncate(fd, size_bytes)
        arena = ArenaFile(path, fd, size_bytes, secrets.token_hex(16))
        _write_private(arena.probe_path, arena.probe_nonce)
        try:
            yield arena
        finally:
            arena.close()
    finally:
        os.close(fd)


def clear_stale(directory: Path) -> int:
    """Remove the arenas in a directory whose owners are gone; return how many there were."""
    cleared = 0
    for path in directory.glob(f"*{SUFFIX}"):
        try:
            fd = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError:
            continue  # not ours to open, or gone already
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            continue
        else:
            path.unlink(missing_ok=True)
            path.with_suffix(PROBE_SUFFIX).unlink(missing_ok=True)
            cleared += 1
        finally:
            os.close(fd)
    return cleared


def choose_directory(configured: str | None, run_dir: Path, size_bytes: int) -> Path:
    """Return where the arena goes: the configured directory, else one in shared memory, else `run_dir`.

    Raises:
        ConfigError: no place has room for the arena, or a directory is not ours alone.
    """
    shared = Path("/dev/shm") / f"covey-{os.getuid()}"  # noqa: S108 - made private below
    candidates = [Path(configured)] if configured else [shared, run_dir / "kvstore"]
    reasons = []
    for path in candidates:
        try:
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
            found = path.lstat()
            usage = os.statvfs(path)
        except OSError as error:
            reasons.append(f"{path}: {error.strerror}")
            continue
        free_bytes = usage.f_bavail * usage.f_frsize
        if path == shared and (not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077):
            reasons.append(f"{path}: not a directory of ours alone")
        elif not os.access(path, os.W_OK):
            reasons.append(f"{path}: not writable")
        elif free_bytes < size_bytes:
            reasons.append(f"{path}: {free_bytes} bytes are free")
        else:
            return path.resolve()
    raise ConfigError(
        f"no place for an arena of {size_bytes} bytes ({'; '.join(reasons)}): set capacity_bytes or arena_dir",
        field="capacity_bytes",
    )


@contextmanager
def _exclusive(directory: Path) -> Iterator[None]:
    """Let one process at a time clear and create: nobody takes a file between its creation and its lock for stale."""
    fd = os.open(directory / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def _write_private(path: Path, text: str) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    with os.fdopen(fd, "w") as file:
        file.write(text)
