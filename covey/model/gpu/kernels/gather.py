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
    geometry = pool.geometry
    out = torch.empty(2, count, geometry.kv_heads, geometry.head_dim, dtype=dtype, device=table.device)
    if count:
        _gather_kernel[(triton.cdiv(count, geometry.block_size), geometry.kv_heads, 2)](
            table,
            pool.numbers,
            pool.scales,
            out,
            count,
            layer * pool.layer_pages,
            geometry.kv_heads,
            geometry.head_dim,
            geometry.block_size,
            pool.block_pages,
            pool.page_stride,
            pool.scale_stride,
            pool.scale_offset,
            tile=triton.next_power_of_2(geometry.block_size),
            block=triton.next_power_of_2(geometry.head_dim),
            quantised=pool.is_quantised,
        )
    return out


def gather_reference(pool: DevicePool, layer: int, table: torch.Tensor, count: int, dtype: torch.dtype) -> torch.Tensor:
    """The same in torch."""
    geometry = pool.geometry
    size, width = geometry.block_size, geometry.head_dim
    blocks = pool.blocks[table.long()]
    pages = blocks.view(len(table), geometry.n_layers, 2, geometry.kv_heads, geometry.page_bytes)[:, layer]
    numbers = pages[..., : size * width * pool.dtype.itemsize].contiguous().view(pool.dtype).float()
    if pool.is_quantised:
        scales = pages[..., size * width :].contiguous().view(torch.float32)
    else:
        scales = torch.ones(*numbers.shape[:-1], size, device=numbers.device)
    keys = numbers[:, 0].unflatten(-1, (width, size)).transpose(-1, -2)
    values = numbers[:, 1].unflatten(-1, (size, width))
    found = torch.stack((keys, values)) * scales.transpose(0, 1)[..., None]
    return found.transpose(2, 3).flatten(1, 2)[:, :count].to(dtype)
