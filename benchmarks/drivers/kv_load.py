"""What every driver of a store shares: blocks to move, and clients that move them at the same time."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable

BATCH_BYTES = 64 * 1024 * 1024
BLOCKS_MAX = 64


def blocks_of(size_bytes: int) -> int:
    """How many blocks one operation moves: 64, or as many as make 64 MiB."""
    return max(1, min(BLOCKS_MAX, BATCH_BYTES // size_bytes))


def contents(size_bytes: int, count: int) -> list[memoryview]:
    """Random bytes, so that nothing compresses them."""
    return [memoryview(os.urandom(size_bytes)) for _ in range(count)]


def together(clients: int, work: Callable[[int], object]) -> float:
    """Seconds that `clients` threads take, each doing `work` with its number; raises what one of them raises."""
    failures: list[BaseException] = []
    gate = threading.Barrier(clients + 1)

    def run(number: int) -> None:
        gate.wait()
        try:
            work(number)
        except BaseException as error:  # noqa: BLE001 - handed to whoever waits
            failures.append(error)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(clients)]
    for thread in threads:
        thread.start()
    gate.wait()
    began = time.perf_counter()
    for thread in threads:
        thread.join()
    took_s = time.perf_counter() - began
    if failures:
        raise failures[0]
    return took_s
