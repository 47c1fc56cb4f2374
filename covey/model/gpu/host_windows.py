"""Blocks in device memory that the host may read and write as plain bytes."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from .pages import DevicePool


@dataclass(slots=True)
class _Window:
    host: torch.Tensor
    views: int


class HostWindows:
    """Host copies of the blocks that somebody looks at.

    A window opens with the block's bytes; what is written into it reaches the device at `write_back`, before the next
    step, and it closes once its last view is released. `refresh` brings what a step wrote to the open ones.
    """

    def __init__(self, pool: DevicePool) -> None:
        self._pool = pool
        self._windows: dict[int, _Window] = {}

    def view(self, block_id: int) -> memoryview:
        """The writable bytes of a block. Raises IndexError outside the pool."""
        if not 0 <= block_id < self._pool.n_blocks:
            raise IndexError(f"block {block_id} is not in 0..{self._pool.n_blocks - 1}")
        window = self._windows.get(block_id)
        if window is None:
            host = torch.empty(self._pool.geometry.block_bytes, dtype=torch.uint8)
            host.copy_(self._pool.blocks[block_id])
            window = self._windows[block_id] = _Window(host, 0)
        window.views += 1
        # The array lives as long as the view that is handed out, and nothing else holds it: its end is the release.
        array = window.host.numpy()
        weakref.finalize(array, _release, window).atexit = False
        return memoryview(array)

    def write_back(self) -> None:
        """Copy every window to the device and forget those that nobody looks at any more."""
        for block_id, window in list(self._windows.items()):
            is_closed = window.views == 0
            self._pool.blocks[block_id].copy_(window.host)
            if is_closed:
                del self._windows[block_id]

    def refresh(self, block_ids: Iterable[int]) -> None:
        """Bring blocks that a step wrote to their open windows."""
        if not self._windows:
            return
        for block_id in self._windows.keys() & set(block_ids):
            self._windows[block_id].host.copy_(self._pool.blocks[block_id])

    @property
    def open_count(self) -> int:
        """Windows that are kept."""
        return len(self._windows)


def _release(window: _Window) -> None:
    window.views -= 1
