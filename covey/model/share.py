"""The host-wide word of who is busy, so that engines on one machine divide its cores instead of fighting over them."""

from __future__ import annotations

import fcntl
import mmap
import os
import struct
import threading
from collections.abc import Callable
from pathlib import Path

from covey.clock import Clock
from covey.errors import Overloaded

_SLOTS, _SLOT_BYTES = 64, 64
_STATE = struct.Struct("<qdd")  # pid, when the running step began (0: none), when the last one ended
_FLOCK = struct.Struct("@hhqqi4x")  # Linux struct flock

LINGER_S = 0.5
"""An engine counts as busy for this long after a step. Shares then stay put while traffic flows: an engine that moves
between one core and two loses more than the second core gives (measured: 56 tokens/s at 0.03 s, 80 at 0.5 s).
"""

STUCK_S = 30.0
"""A step that runs longer than this no longer holds cores back from the others."""


def thread_environment() -> dict[str, str]:
    """Variables that a launcher sets before torch is imported: idle worker threads sleep instead of spinning on a core.

    They spin for some 20 µs first, as long as it takes to get from one layer to the next: waking a sleeper costs 70 µs.
    """
    return {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "5000", "KMP_BLOCKTIME": "0", "MKL_DYNAMIC": "FALSE"}


def fair_cores(cores: tuple[int, ...], rank: int, busy: int) -> tuple[int, ...]:
    """The cores of the `rank`-th of `busy` engines: disjoint equal parts, or one core each in turn when there are too
    few.
    """
    count = len(cores)
    if busy > count:
        return (cores[rank % count],)
    return cores[rank * count // busy : (rank + 1) * count // busy]


class CoreShare:
    """One engine's seat in the shared file `engines.share`; `begin` and `end` bracket each step, on the engine's own
    thread.

    A lock on the seat's byte says that its owner lives: the kernel drops it with the process, in any container.
    """

    def __init__(self, path: Path, *, clock: Clock, cores: tuple[int, ...] | None = None) -> None:
        """Take a free seat. Raises Overloaded when 64 engines already sit there."""
        self._clock = clock
        self._cores = cores or tuple(sorted(os.sched_getaffinity(0)))
        self._applied: tuple[int, tuple[int, ...]] | None = None
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            if os.fstat(self._fd).st_size < _SLOTS * _SLOT_BYTES:
                os.ftruncate(self._fd, _SLOTS * _SLOT_BYTES)
            self._slot = self._claim()
        except BaseException:
            os.close(self._fd)
            raise
        self._memory = mmap.mmap(self._fd, _SLOTS * _SLOT_BYTES)
        self._write(0.0, 0.0)

    def begin(self, set_threads: Callable[[int], None]) -> tuple[int, ...]:
        """Say that a step begins and take this engine's cores: all when alone, else a fair share; returns them.

        A share of one core is pinned. Larger shares only set the number of threads: OpenMP's workers keep the mask
        that they were born with, and one born under a narrow mask could never spread again.
        """
        now = self._clock.now()
        self._write(now, now)
        busy = [slot for slot in range(_SLOTS) if slot == self._slot or self._is_busy(slot, now)]
        mine = fair_cores(self._cores, busy.index(self._slot), len(busy))
        wanted = (threading.get_ident(), mine)
        if wanted != self._applied:
            os.sched_setaffinity(0, mine if len(mine) == 1 else self._cores)
            set_threads(len(mine))
            self._applied = wanted
        return mine

    def end(self) -> None:
        """Say that the step is over."""
        self._write(0.0, self._clock.now())

    def close(self) -> None:
        """Leave the seat."""
        self._write(0.0, 0.0)
        self._memory.close()
        os.close(self._fd)

    def _write(self, began: float, ended: float) -> None:
        _STATE.pack_into(self._memory, self._slot * _SLOT_BYTES, os.getpid(), began, ended)

    def _is_busy(self, slot: int, now: float) -> bool:
        _pid, began, ended = _STATE.unpack_from(self._memory, slot * _SLOT_BYTES)
        in_step = began > 0.0 and now - began < STUCK_S
        return (in_step or (ended > 0.0 and now - ended < LINGER_S)) and not self._lock(slot, fcntl.F_OFD_GETLK)

    def _claim(self) -> int:
        for slot in range(_SLOTS):
            if self._lock(slot, fcntl.F_OFD_SETLK):
                return slot
        raise Overloaded(f"{_SLOTS} engines already share this machine")

    def _lock(self, slot: int, command: int) -> bool:
        """Take (F_OFD_SETLK) or try out (F_OFD_GETLK) a seat's lock: whether it is, or was, free."""
        request = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, slot * _SLOT_BYTES, 1, 0)
        try:
            answer = fcntl.fcntl(self._fd, command, request)
        except BlockingIOError:
            return False
        return command == fcntl.F_OFD_SETLK or _FLOCK.unpack(answer)[0] == fcntl.F_UNLCK
