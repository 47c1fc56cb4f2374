"""What a process asks of Linux: to die with its parent, and which boot of which machine it is."""

from __future__ import annotations

import ctypes
import os
import signal
import socket
from functools import cache
from pathlib import Path

PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None, use_errno=True)  # loaded before any fork: nothing may be imported between fork and exec


@cache
def boot_id() -> str:
    """Return the machine's boot id: equal for all processes of one boot, its containers included."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return socket.gethostname()


def die_with_parent(number: signal.Signals = signal.SIGKILL, *, parent: int | None = None) -> None:
    """Have the kernel send `number` to this process when the thread that started it ends.

    `parent` is the starting process: if it has ended already, `number` comes at once. Safe between fork and exec.
    Where there is no prctl it has no effect.
    """
    prctl = getattr(_libc, "prctl", None)
    if prctl is None:
        return
    prctl(PR_SET_PDEATHSIG, int(number), 0, 0, 0)
    if parent is not None and os.getppid() != parent:
        os.kill(os.getpid(), number)
