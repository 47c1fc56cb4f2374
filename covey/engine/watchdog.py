"""Ends the process when its engine is stuck for good: only a new process cures that, and whoever watches starts one."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from covey.clock import Clock

from .board import Board

EXIT_CODE = 1

log = logging.getLogger(__name__)


@contextmanager
def watchdog(
    board: Board, clock: Clock, *, stuck_s: float, end: Callable[[int], object] = os._exit
) -> Iterator[threading.Thread]:
    """Look, from a thread, whether a step or the event loop takes longer than `stuck_s`; then `end` the process.

    A thread, because nothing else runs when the event loop hangs; no clean-up, because it would hang too.
    """
    stop = threading.Event()

    def watch() -> None:
        while not stop.wait(stuck_s / 4):
            if board.is_stuck(clock.now(), stuck_s):
                log.critical("the engine is stuck; ending the process")
                end(EXIT_CODE)
                return

    thread = threading.Thread(target=watch, name="watchdog", daemon=True)
    thread.start()
    try:
        yield thread
    finally:
        stop.set()  # it ends by itself: waiting for it would hold up the event loop
