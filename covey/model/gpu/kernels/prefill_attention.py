"""Causal attention of chunks of new tokens, ragged, over their paged contexts: prefixes, and the chunks themselves.

The keys and values of the chunks are stored before, so that everything is read from pages: how a prompt is cut into
chunks changes no bit of a query's result.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from covey.model.gpu.pages import DevicePool

from .gather import gather_reference
from .tiles import TRITON_DTYPES, attend_tile, dot_dtype, finished, no_tokens, padded

TILE_QUERIES = 32
"""Queries of one program."""

_TILE = 32
"""Tokens of one product."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunks:
    """Chunks of new tokens; int32 on the device.

    Chunk i is rows `firsts[i] .. firsts[i] + lengths[i]` of the batch, at positions from `starts[i]`, with the block
    table `tables[i]`. `tiles` [tile, 2] cuts them into work: a chunk, and the first of at most `TILE_QUERIES` queries
    in it.
    """

    firsts: torch.Tensor
    lengths: torch.Tensor
    starts: torch.Tensor
    tables: torch.Tensor
    tiles: torch.Tensor


@triton.jit
def _prefill_kernel(
    q,
    out,
    numbers,
    scales,
    tables,
    firsts,
    lengths,
    starts,
    tiles,
    softmax_scale,
    first_page,
    q_stride,
    out_stride,
    table_stride,
    group: tl.constexpr,
    head_dim: tl.constexpr,
    block_size: tl.constexpr,
    kv_heads: tl.constexpr,
    block_pages: tl.constexpr,
    quantised: tl.constexpr,
    tile: tl.constexpr,
    block_m: tl.constexpr,
    block_d: tl.constexpr,
    dot_type: tl.constexpr,
):
    chunk = tl.load(tiles + 2 * tl.program_id(0))
    head = tl.program_id(1)
    member = tl.load(tiles + 2 * tl.program_id(0) + 1) + tl.arange(0, block_m)
    length, start = tl.load(lengths + chunk), tl.load(starts + chunk)
    row = (tl.load(firsts + chunk) + member).to(tl.int64)
    column = tl.arange(0, block_d)
    inside = (member < length)[:, None] & (column < head_dim)[None, :]
    place = (head * head_dim + column)[None, :]
    queries = tl.load(q + row[:, None] * q_stride + place, mask=inside, other=0.0).to(dot_type)
    top, weight, total = no_tokens(block_m, block_d)
    last = start + tl.minimum(length, tl.max(member, axis=0) + 1)
    for at in range(0, last, tile):
        top, weight, total = attend_tile(
            queries,
            top,
            weight,
            total,
            numbers,
            scales,
            tables + chunk.to(tl.int64) * table_stride,
            at + tl.arange(0, tile),
            last,
            (start + member)[:, None],
            first_page + head // group,
            column,
            softmax_scale,
            head_dim,
            block_size,
            kv_heads,
            block_pages,
            quantised,
        )
    attended, _ = finished(top, weight, total)
    tl.store(out + row[:, None] * out_stride + place, attended.to(out.dtype.element_ty), mask=inside)


def prefill_attention(q: torch.Tensor, pool: DevicePool, layer: int, chunks: Chunks, out: torch.Tensor) -> None:
    """Fill the chunks' rows of `out` [n, heads, head_dim] for queries `q` [n, >= heads * head_dim], rows of any stride.

    A query sees every position up to its own; the chunks' own keys and values are stored already.
    """
    geometry = pool.geometry
    _, heads, head_dim = out.shape
    if not len(chunks.tiles):
        return
    _prefill_kernel[(len(chunks.tiles), heads)](
        q,
        out,
        pool.numbers,
        pool.scales,
        chunks.tables,
        chunks.firsts,
        chunks.lengths,
        chunks.starts,
        chunks.tiles,
        head_dim**-0.5,
        layer * pool.layer_pages,
        q.stride(0),
        out.stride(0),
        chunks.tables.stride(0),
        group=heads // geometry.kv_heads,
        head_dim=head_dim,
        block_size=geometry.block_size,
        kv_heads=geometry.kv_heads,
        block_pages=pool.block_pages,
        quantised=pool.is_quantised,
        tile=_TILE,
        block_m=TILE_QUERIES,
        block_d=padded(head_dim),
        dot_type=TRITON_DTYPES[dot_dtype(q, geometry)],
    )


def prefill_attention_reference(
    q: torch.Tensor, pool: DevicePool, layer: int, chunks: Chunks, out: torch.Tensor
) -> None:
    """The same in torch."""
    _, heads, head_dim = out.shape
    group = heads // pool.geometry.kv_heads
    rows = zip(chunks.firsts.tolist(), chunks.lengths.tolist(), chunks.starts.tolist(), chunks.tables, strict=True)
    for first, length, start, table in rows:
        end = start + length
        k, v = gather_reference(pool, layer, table[: -(-end // pool.geometry.block_size)], end, torch.float32)
        query = q[first : first + length, : heads * head_dim].float().view(length, heads, head_dim)
        keys, values = (x.repeat_interleave(group, dim=1) for x in (k, v))
        scores = torch.einsum("qhd,nhd->hqn", query, keys) * head_dim**-0.5
        future = torch.ones(length, end, dtype=torch.bool, device=q.device).triu(start + 1)
        weights = scores.masked_fill(future, -torch.inf).softmax(dim=2)
        out[first : first + length] = torch.einsum("hqn,nhd->qhd", weights, values).to(out.dtype)
