"""The paged pool of keys and values in device memory: blocks laid out as `covey.model.pool` says."""

from __future__ import annotations

import torch

from covey.errors import InvalidArgument, NoSpace
from covey.model.pool import Geometry

_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "int8": torch.int8}
_FLOAT_BYTES = 4


class DevicePool:
    """`n_blocks` blocks in the memory of `device`.

    `blocks` [block, byte] is the buffer, `numbers` all of it as stored numbers and `scales` as fp32: what the kernels
    index. They step by pages: `block_pages` a block, `layer_pages` a layer, `page_stride` numbers apart; the scales of
    int8 pages are `scale_stride` apart and begin `scale_offset` into the page, both in fp32 numbers.

    Raises InvalidArgument where the scales of int8 pages would not be aligned, NoSpace when the device is too small.
    """

    def __init__(self, geometry: Geometry, n_blocks: int, device: torch.device) -> None:
        self.geometry = geometry
        self.n_blocks = n_blocks
        self.dtype = _DTYPES[geometry.kv_dtype]
        self.is_quantised = geometry.kv_dtype == "int8"
        if self.is_quantised and geometry.values_per_page % _FLOAT_BYTES:
            raise InvalidArgument(
                "int8 pages need block_size * head_dim to be a multiple of 4, so that their scales are aligned",
                field="engine.block_size",
            )
        self.layer_pages = 2 * geometry.kv_heads
        self.block_pages = geometry.n_layers * self.layer_pages
        self.page_stride = geometry.page_bytes // self.dtype.itemsize
        self.scale_stride = geometry.page_bytes // _FLOAT_BYTES if self.is_quantised else 0
        self.scale_offset = geometry.values_per_page // _FLOAT_BYTES if self.is_quantised else 0
        try:
            self.blocks = torch.zeros(n_blocks, geometry.block_bytes, dtype=torch.uint8, device=device)
        except torch.OutOfMemoryError as error:
            need_mib = n_blocks * geometry.block_bytes >> 20
            raise NoSpace(f"the device has no {need_mib} MiB for {n_blocks} blocks; lower engine.n_blocks") from error
        flat = self.blocks.view(-1)
        self.numbers = flat.view(self.dtype)
        self.scales = flat.view(torch.float32) if self.is_quantised else torch.zeros(1, device=device)

    def clear(self, block_ids: torch.Tensor) -> None:
        """Zero blocks."""
        self.blocks.index_fill_(0, block_ids, 0)
