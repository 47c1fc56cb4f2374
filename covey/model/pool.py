"""The paged pool of keys and values: one anonymous mapping, cut into blocks that can be read and written as plain
bytes.
"""

from __future__ import annotations

import mmap
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch

from .config import ModelConfig
from .matrix import Precision

KvDtype = Literal["fp32", "fp16", "int8"]

AUTO: Mapping[Precision, KvDtype] = {"fp32": "fp32", "bf16": "fp16", "int8": "fp16"}
"""What keys and values are kept in beside weights of a precision: halves lose less than lossy weights do."""

_TYPES = {"fp32": torch.float32, "fp16": torch.float16, "int8": torch.int8}
_SCALE_BYTES = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Geometry:
    """How a block lies in memory: [n_layers, 2 (K, V), kv_heads] pages.

    A page is one head's keys or values of one layer. Keys are transposed, [head_dim, block_size], values are
    [block_size, head_dim]; an int8 page ends with one fp32 scale a token.
    """

    n_layers: int
    kv_heads: int
    head_dim: int
    block_size: int
    kv_dtype: KvDtype = "fp32"

    @classmethod
    def of(cls, config: ModelConfig, block_size: int, kv_dtype: KvDtype = "fp32") -> Geometry:
        """The geometry of a model's blocks of `block_size` tokens."""
        return cls(
            n_layers=config.n_layers,
            kv_heads=config.n_kv_heads,
            head_dim=config.head_dim,
            block_size=block_size,
            kv_dtype=kv_dtype,
        )

    @property
    def values_per_page(self) -> int:
        """Numbers of a page."""
        return self.block_size * self.head_dim

    @property
    def page_bytes(self) -> int:
        """One page, scales included."""
        scales = _SCALE_BYTES * self.block_size if self.kv_dtype == "int8" else 0
        return self.values_per_page * _TYPES[self.kv_dtype].itemsize + scales

    @property
    def block_bytes(self) -> int:
        """One block over all layers, keys and values."""
        return self.page_bytes * self.n_layers * 2 * self.kv_heads


class KvPool:
    """`n_blocks` blocks. Untouched blocks take no physical memory."""

    def __init__(self, geometry: Geometry, n_blocks: int) -> None:
        self.geometry = geometry
        self.n_blocks = n_blocks
        self._memory = mmap.mmap(-1, geometry.block_bytes * n_blocks, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._bytes = torch.frombuffer(self._memory, dtype=torch.uint8)
        pages = self._bytes.view(n_blocks, geometry.n_layers, 2, geometry.kv_heads, geometry.page_bytes)
        value_bytes = geometry.values_per_page * _TYPES[geometry.kv_dtype].itemsize
        self._values = pages[..., :value_bytes].view(_TYPES[geometry.kv_dtype])
        self._scales = pages[..., value_bytes:].view(torch.float32)

    @property
    def address(self) -> int:
        """Where the first block lies."""
        return int(self._bytes.data_ptr())

    def view(self, block_id: int) -> memoryview:
        """The writable bytes of one block. Raises IndexError outside the pool."""
        if not 0 <= block_id < self.n_blocks:
            raise IndexError(f"block {block_id} is not in 0..{self.n_blocks - 1}")
        size = self.geometry.block_bytes
        return memoryview(self._memory)[block_id * size : (block_id + 1) * size]

    def clear(self, block_id: int) -> None:
        """Zero a block."""
        size = self.geometry.block_bytes
        self._bytes[block_id * size : (block_id + 1) * size].zero_()

    def write(
        self, layer: int, blocks: torch.Tensor, slots: torch.Tensor, keys: torch.Tensor, values: torch.Tensor
    ) -> None:
        """Put `keys` and `values` [token, kv head, head_dim] into each token's block and slot."""
        for kind, given in enumerate((keys, values)):
            rows, scales = self._encode(given)
            pages = self._values[:, layer, kind]
            if kind == 0:
                torch.unflatten(pages, -1, (self.geometry.head_dim, self.geometry.block_size))[blocks, :, :, slots] = (
                    rows
                )
            else:
                torch.unflatten(pages, -1, (self.geometry.block_size, self.geometry.head_dim))[blocks, :, slots] = rows
            if scales is not None:
                self._scales[:, layer, kind][blocks, :, slots] = scales

    def read(self, layer: int, table: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values [kv head, position, head_dim] of a block table, in fp32."""
        size, width = self.geometry.block_size, self.geometry.head_dim
        keys = torch.unflatten(self._values[table, layer, 0].float(), -1, (width, size))
        values = torch.unflatten(self._values[table, layer, 1].float(), -1, (size, width))
        if self.geometry.kv_dtype == "int8":
            keys = keys * self._scales[table, layer, 0][:, :, None, :]
            values = values * self._scales[table, layer, 1][:, :, :, None]
        return keys.permute(1, 0, 3, 2).flatten(1, 2), values.transpose(0, 1).flatten(1, 2)

    def _encode(self, given: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        if self.geometry.kv_dtype != "int8":
            return given.to(_TYPES[self.geometry.kv_dtype]), None
        scales = given.abs().amax(dim=-1) / 127.0
        inverse = torch.where(scales > 0, 1.0 / scales, 0.0)
        return torch.round(given * inverse[..., None]).to(torch.int8), scales
