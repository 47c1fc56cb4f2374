"""The paged pool of keys and values in device memory, and how one block of it is laid out."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from covey.errors import InvalidArgument, NoSpace
from covey.model.config import ModelConfig

KV_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "int8": torch.int8}
"""How keys and values may be stored."""

_FLOAT_BYTES = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class PageLayout:
    """How a block lies in memory: [n_layers][K pages of kv_heads][V pages of kv_heads].

    A K page is transposed, [head_dim, block_size], and a V page is [block_size, head_dim]. With int8 each page is
    followed by `block_size` fp32 scales, one a token.
    """

    n_layers: int
    kv_heads: int
    head_dim: int
    block_size: int
    kv_dtype: str

    def __post_init__(self) -> None:
        if self.kv_dtype not in KV_DTYPES:
            raise InvalidArgument(
                f"kv_dtype {self.kv_dtype!r} is not one of {', '.join(KV_DTYPES)}", field="engine.kv_dtype"
            )
        if self.is_quantised and self.block_size * self.head_dim % _FLOAT_BYTES:
            raise InvalidArgument(
                "int8 pages need block_size * head_dim to be a multiple of 4, so that their scales are aligned",
                field="engine.block_size",
            )

    @classmethod
    def of(cls, config: ModelConfig, *, block_size: int, kv_dtype: str) -> PageLayout:
        """The layout of a model's blocks of `block_size` tokens. Raises InvalidArgument."""
        return cls(
            n_layers=config.n_layers,
            kv_heads=config.n_kv_heads,
            head_dim=config.head_dim,
            block_size=block_size,
            kv_dtype=kv_dtype,
        )

    @property
    def dtype(self) -> torch.dtype:
        """The type of a stored number."""
        return KV_DTYPES[self.kv_dtype]

    @property
    def is_quantised(self) -> bool:
        """Whether pages carry scales."""
        return self.kv_dtype == "int8"

    @property
    def page_bytes(self) -> int:
        """One head's keys (or values) of one layer in one block, scales included."""
        numbers = self.block_size * self.head_dim * self.dtype.itemsize
        return numbers + (self.block_size * _FLOAT_BYTES if self.is_quantised else 0)

    @property
    def page_stride(self) -> int:
        """From page to page, in stored numbers."""
        return self.page_bytes // self.dtype.itemsize

    @property
    def scale_stride(self) -> int:
        """From the scales of a page to those of the next, in fp32 numbers; 0 without scales."""
        return self.page_bytes // _FLOAT_BYTES if self.is_quantised else 0

    @property
    def scale_offset(self) -> int:
        """From the start of a page to its scales, in fp32 numbers; 0 without scales."""
        return self.block_size * self.head_dim // _FLOAT_BYTES if self.is_quantised else 0

    @property
    def layer_pages(self) -> int:
        """Pages of one block in one layer."""
        return 2 * self.kv_heads

    @property
    def block_pages(self) -> int:
        """Pages of one block."""
        return self.n_layers * self.layer_pages

    @property
    def block_bytes(self) -> int:
        """One block over all layers, keys and values."""
        return self.block_pages * self.page_bytes


class DevicePool:
    """`n_blocks` blocks in the memory of `device`.

    `numbers` is the whole buffer as stored numbers and `scales` the same memory as fp32: what the kernels index.
    Raises NoSpace when the device has not that much memory.
    """

    def __init__(self, layout: PageLayout, n_blocks: int, device: torch.device) -> None:
        self.layout = layout
        self.n_blocks = n_blocks
        try:
            self.blocks = torch.zeros(n_blocks, layout.block_bytes, dtype=torch.uint8, device=device)
        except torch.OutOfMemoryError as error:
            need_mib = n_blocks * layout.block_bytes >> 20
            raise NoSpace(f"the device has no {need_mib} MiB for {n_blocks} blocks; lower engine.n_blocks") from error
        flat = self.blocks.view(-1)
        self.numbers = flat.view(layout.dtype)
        self.scales = flat.view(torch.float32) if layout.is_quantised else torch.zeros(1, device=device)

    def clear(self, block_ids: torch.Tensor) -> None:
        """Zero blocks."""
        self.blocks.index_fill_(0, block_ids, 0)
