"""The machine's memory as a driver: what a copy of the same bytes costs when nothing else is done."""

from __future__ import annotations

import os
import time
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from statistics import median

import numpy as np

from benchmarks.drivers.kv_load import BATCH_BYTES, blocks_of
from benchmarks.drivers.lines import private_output, serve

REPEATS = 5


class Memory:
    """Copies between buffers that were touched before, by one thread and by one for each core: the better counts."""

    def __init__(self) -> None:
        self._source = np.frombuffer(os.urandom(BATCH_BYTES), np.uint8)
        self._target = np.zeros(BATCH_BYTES, np.uint8)
        self._cores = len(os.sched_getaffinity(0))
        self._pool = ThreadPoolExecutor(self._cores)

    def copy(self, size: int) -> float:
        """Seconds to copy a batch of blocks, the median of a few."""
        return min(self._median_s(size, threads) for threads in sorted({1, self._cores}))

    def _median_s(self, size: int, threads: int) -> float:
        count, times = blocks_of(size), []
        for _ in range(REPEATS):
            began = time.perf_counter()
            if threads == 1:
                self._copy(size, range(count))
            else:
                list(self._pool.map(lambda n: self._copy(size, range(n, count, threads)), range(threads)))
            times.append(time.perf_counter() - began)
        return median(times)

    def _copy(self, size: int, blocks: range) -> None:
        for block in blocks:
            where = slice(block * size, (block + 1) * size)
            np.copyto(self._target[where], self._source[where])


def main() -> None:
    """Serve until standard input ends."""
    lines = private_output()
    serve(version("numpy"), {"copy": Memory().copy}, lines)


if __name__ == "__main__":
    main()
