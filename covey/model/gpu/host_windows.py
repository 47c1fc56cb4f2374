"""Blocks in device memory that the host may read and write as plain bytes."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch

from .pages import DevicePool


@dataclass(slots=True)
class _Window:
    host: torch.Tensor
    opened: int = 0
    released: list[None] = field(default_factory=list)
    """An entry a view: appending needs no lock, wherever the collector runs."""

    @property
    def is_closed(self) -> bool:
        return len(self.released) == self.opened


class HostWindows:
    """Host copies of the blocks that somebody looks at.

    A window opens with the block's bytes; what is written into it reaches the device at `write_back`, before the next
    step, and it closes once its last view is released. `refresh` brings what a step wrote to the open ones. Any thread
    may ask for views and release them.
    """

    def __init__(self, pool: DevicePool) -> None:
        self._pool = pool
        self._windows: dict[int, _Window] = {}
        self._lock = threading.Lock()

    def view(self, block_id: int) -> memoryview:
        """The writable bytes of a block. Raises IndexError outside the pool."""
        if not 0 <= block_id < self._pool.n_blocks:
            raise IndexError(f"block {block_id} is not in 0..{self._pool.n_blocks - 1}")
        with self._lock:
            window = self._windows.get(block_id)
            if window is None:
                host = torch.empty(self._pool.geometry.block_bytes, dtype=torch.uint8)
                host.copy_(self._pool.blocks[block_id])
                window = self._windows[block_id] = _Window(host)
            window.opened += 1
        # The array lives as long as the view that is handed out, and nothing else holds it: its end is the release.
        array = window.host.numpy()
        weakref.finalize(array, window.released.append, None).atexit = False
        return memoryview(array)  # type: ignore[arg-type]

    def write_back(self) -> None:
        """Copy every window to the device and forget those that nobody looks at any more."""
        with self._lock:
            for block_id, window in list(self._windows.items()):
                is_closed = window.is_closed
                self._pool.blocks[block_id].copy_(window.host)
                if is_closed:
                    del self._windows[block_id]

    def refresh(self, block_ids: Iterable[int]) -> None:
        """Bring blocks that a step wrote to their open windows."""
        with self._lock:
            for block_id in self._windows.keys() & set(block_ids):
                self._windows[block_id].host.copy_(self._pool.blocks[block_id])

    @property
    def open_count(self) -> int:
        """Windows that are kept."""
        return len(self._windows)
