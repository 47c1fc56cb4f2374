"""The paged pool of keys and values: one anonymous mapping, cut into blocks that can be read and written as plain
bytes.
"""

from __future__ import annotations

import mmap
from dataclasses import dataclass

import torch

from .config import ModelConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class Geometry:
    """How a block lies in memory: [n_layers, 2, kv_heads, block_size, head_dim] of fp32, contiguous."""

    n_layers: int
    kv_heads: int
    head_dim: int
    block_size: int

    @classmethod
    def of(cls, config: ModelConfig, block_size: int) -> Geometry:
        """The geometry of a model's blocks of `block_size` tokens."""
        return cls(
            n_layers=config.n_layers, kv_heads=config.n_kv_heads, head_dim=config.head_dim, block_size=block_size
        )

    @property
    def block_bytes(self) -> int:
        """One block over all layers, keys and values."""
        return 4 * self.pages_per_block * self.block_size * self.head_dim

    @property
    def pages_per_block(self) -> int:
        """A page is one head's keys (or values) of one layer in one block."""
        return self.n_layers * self.pages_per_layer

    @property
    def pages_per_layer(self) -> int:
        """Pages of one block in one layer."""
        return 2 * self.kv_heads


class KvPool:
    """`n_blocks` blocks and one more, `null_block`, which stays zero and pads block tables.

    `pages` [page, block_size * head_dim] is what attention gathers, `slots` [page * block_size, head_dim] what a step
    scatters into; both are views of the same memory. Untouched blocks take no physical memory.
    """

    def __init__(self, geometry: Geometry, n_blocks: int) -> None:
        self.geometry = geometry
        self.n_blocks = n_blocks
        self.null_block = n_blocks
        self._memory = mmap.mmap(-1, geometry.block_bytes * (n_blocks + 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        flat = torch.frombuffer(self._memory, dtype=torch.float32)
        self.pages = flat.view(-1, geometry.block_size * geometry.head_dim)
        self.slots = flat.view(-1, geometry.head_dim)
        self._blocks = flat.view(n_blocks + 1, -1)

    def view(self, block_id: int) -> memoryview:
        """The writable bytes of one block. Raises IndexError outside the pool."""
        if not 0 <= block_id < self.n_blocks:
            raise IndexError(f"block {block_id} is not in 0..{self.n_blocks - 1}")
        size = self.geometry.block_bytes
        return memoryview(self._memory)[block_id * size : (block_id + 1) * size]

    def clear(self, block_id: int) -> None:
        """Zero a block."""
        self._blocks[block_id].zero_()
