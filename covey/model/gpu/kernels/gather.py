"""Reads a sequence's keys and values out of its pages into plain tensors."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from covey.model.gpu.pages import DevicePool


@triton.jit
def _gather_kernel(
    table,
    numbers,
    scales,
    out,
    count,
    first_page,
    kv_heads,
    head_dim,
    block_size,
    block_pages,
    page_stride,
    scale_stride,
    scale_offset,
    tile: tl.constexpr,
    block: tl.constexpr,
    quantised: tl.constexpr,
):
    place = tl.program_id(0)
    head = tl.program_id(1)
    is_value = tl.program_id(2)
    position = tl.arange(0, tile)
    column = tl.arange(0, block)
    page = tl.load(table + place).to(tl.int64) * block_pages + first_page + is_value * kv_heads + head
    token = place * block_size + position
    wanted = (position < block_size) & (token < count)
    inside = wanted[:, None] & (column < head_dim)[None, :]
    along = tl.where(is_value == 1, position * head_dim, position)[:, None]
    across = tl.where(is_value == 1, column, column * block_size)[None, :]
    x = tl.load(numbers + page * page_stride + along + across, mask=inside, other=0.0).to(tl.float32)
    if quantised:
        x *= tl.load(scales + page * scale_stride + scale_offset + position, mask=wanted, other=0.0)[:, None]
    row = (is_value.to(tl.int64) * count + token) * kv_heads + head
    tl.store(out + row[:, None] * head_dim + column[None, :], x.to(out.dtype.element_ty), mask=inside)


def gather(pool: DevicePool, layer: int, table: torch.Tensor, count: int, dtype: torch.dtype) -> torch.Tensor:
    """Keys and values [2, count, kv_heads, head_dim] of a layer as `dtype`.

    `table` (int32) names the blocks of the first `count` positions of a sequence.
    """
    layout = pool.layout
    out = torch.empty(2, count, layout.kv_heads, layout.head_dim, dtype=dtype, device=table.device)
    if count:
        _gather_kernel[(triton.cdiv(count, layout.block_size), layout.kv_heads, 2)](
            table,
            pool.numbers,
            pool.scales,
            out,
            count,
            layer * layout.layer_pages,
            layout.kv_heads,
            layout.head_dim,
            layout.block_size,
            layout.block_pages,
            layout.page_stride,
            layout.scale_stride,
            layout.scale_offset,
            tile=triton.next_power_of_2(layout.block_size),
            block=triton.next_power_of_2(layout.head_dim),
            quantised=layout.is_quantised,
        )
    return out


def gather_reference(pool: DevicePool, layer: int, table: torch.Tensor, count: int, dtype: torch.dtype) -> torch.Tensor:
    """The same in torch."""
    layout = pool.layout
    size, width = layout.block_size, layout.head_dim
    blocks = pool.blocks[table.long()]
    pages = blocks.view(len(table), layout.n_layers, 2, layout.kv_heads, layout.page_bytes)[:, layer]
    numbers = pages[..., : size * width * layout.dtype.itemsize].contiguous().view(layout.dtype).float()
    if layout.is_quantised:
        scales = pages[..., size * width :].contiguous().view(torch.float32)
    else:
        scales = torch.ones(*numbers.shape[:-1], size, device=numbers.device)
    keys = numbers[:, 0].unflatten(-1, (width, size)).transpose(-1, -2)
    values = numbers[:, 1].unflatten(-1, (size, width))
    found = torch.stack((keys, values)) * scales.transpose(0, 1)[..., None]
    return found.transpose(2, 3).flatten(1, 2)[:, :count].to(dtype)
