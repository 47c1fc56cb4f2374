"""Writes the keys and values of new tokens into their pages, quantised where the pages are."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from covey.model.gpu.pages import DevicePool

from .quantise import quantise_reference, quantise_rows

_TILE = 16
"""Tokens a program handles."""


@triton.jit
def _scatter_kernel(
    kv,
    slots,
    numbers,
    scales,
    n,
    stride,
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
    token = tl.program_id(0) * tile + tl.arange(0, tile)
    head = tl.program_id(1)
    is_value = tl.program_id(2)
    column = tl.arange(0, block)
    slot = tl.load(slots + token, mask=token < n, other=-1).to(tl.int64)
    wanted = slot >= 0
    inside = wanted[:, None] & (column < head_dim)[None, :]
    source = kv + token.to(tl.int64)[:, None] * stride + ((is_value * kv_heads + head) * head_dim + column)[None, :]
    x = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    page = slot // block_size * block_pages + first_page + is_value * kv_heads + head
    position = slot % block_size
    # A key page is transposed: [head_dim, block_size].
    along = tl.where(is_value == 1, position * head_dim, position)[:, None]
    across = tl.where(is_value == 1, column, column * block_size)[None, :]
    target = numbers + page[:, None] * page_stride + along + across
    if quantised:
        stored, scale = quantise_rows(x)
        tl.store(target, stored, mask=inside)
        tl.store(scales + page * scale_stride + scale_offset + position, scale, mask=wanted)
    else:
        tl.store(target, x.to(numbers.dtype.element_ty), mask=inside)


def scatter(kv: torch.Tensor, slots: torch.Tensor, pool: DevicePool, layer: int) -> None:
    """Store `kv` [n, 2 * kv_heads * head_dim], keys before values, rows of any stride, at `slots` [n] of a layer.

    A slot (any integer type) is block * block_size + position in the block; a negative one is skipped. Keys are rotated
    already.
    """
    geometry, n = pool.geometry, kv.shape[0]
    if n:
        _scatter_kernel[(triton.cdiv(n, _TILE), geometry.kv_heads, 2)](
            kv,
            slots,
            pool.numbers,
            pool.scales,
            n,
            kv.stride(0),
            layer * pool.layer_pages,
            geometry.kv_heads,
            geometry.head_dim,
            geometry.block_size,
            pool.block_pages,
            pool.page_stride,
            pool.scale_stride,
            pool.scale_offset,
            tile=_TILE,
            block=triton.next_power_of_2(geometry.head_dim),
            quantised=pool.is_quantised,
        )


def scatter_reference(kv: torch.Tensor, slots: torch.Tensor, pool: DevicePool, layer: int) -> None:
    """The same in torch."""
    geometry = pool.geometry
    heads = kv.reshape(-1, 2, geometry.kv_heads, geometry.head_dim)[slots >= 0]
    slots = slots[slots >= 0]
    numbers, scales = heads, None
    if pool.is_quantised:
        flat, scales = quantise_reference(heads.reshape(-1, geometry.head_dim))
        numbers = flat.view(heads.shape)
    kind = torch.arange(2, device=slots.device)[None, :, None]
    head = torch.arange(geometry.kv_heads, device=slots.device)[None, None, :]
    block = (slots // geometry.block_size)[:, None, None] * pool.block_pages
    page = block + layer * pool.layer_pages + kind * geometry.kv_heads + head
    position = (slots % geometry.block_size)[:, None, None, None]
    column = torch.arange(geometry.head_dim, device=slots.device)
    inner = torch.where(
        kind[..., None] == 1, position * geometry.head_dim + column, column * geometry.block_size + position
    )
    at = page[..., None] * pool.page_stride + inner
    pool.numbers[at.reshape(-1)] = numbers.reshape(-1).to(pool.dtype)
    if scales is not None:
        pool.scales[(page * pool.scale_stride + pool.scale_offset + position[..., 0]).reshape(-1)] = scales
