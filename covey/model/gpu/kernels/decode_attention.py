"""Attention of single new tokens over their paged contexts: split-KV (Flash-Decoding), grouped queries.

Every program takes one kv head of one row and one stretch of `split_tokens` of its context; the partial outputs are
merged by log-sum-exp. A stretch is cut by position, never by what else is in the batch, and empty ones change nothing,
so a row's result has the same bits in any batch.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from covey.model.gpu.pages import DevicePool

from .gather import gather_reference
from .merge import merge
from .tiles import TRITON_DTYPES, attend_tile, dot_dtype, finished, no_tokens, padded

SPLIT_TOKENS = 512
"""The default stretch of context of a program."""

_TILE = 32
"""Tokens of one product."""


@triton.jit
def _decode_kernel(
    q,
    partial,
    partial_lse,
    numbers,
    scales,
    tables,
    contexts,
    softmax_scale,
    first_page,
    q_stride,
    table_stride,
    split_tokens,
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
    row, head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    member = tl.arange(0, block_m)
    column = tl.arange(0, block_d)
    inside = (member < group)[:, None] & (column < head_dim)[None, :]
    query = head * group + member
    at_query = q + row.to(tl.int64) * q_stride + query[:, None] * head_dim + column[None, :]
    queries = tl.load(at_query, mask=inside, other=0.0).to(dot_type)
    top, weight, total = no_tokens(block_m, block_d)
    table = tables + row.to(tl.int64) * table_stride
    first = split * split_tokens
    last = tl.minimum(first + split_tokens, tl.load(contexts + row))
    for at in range(first, last, tile):
        top, weight, total = attend_tile(
            queries,
            top,
            weight,
            total,
            numbers,
            scales,
            table,
            at + tl.arange(0, tile),
            last,
            last,
            first_page + head,
            column,
            softmax_scale,
            head_dim,
            block_size,
            kv_heads,
            block_pages,
            quantised,
        )
    attended, lse = finished(top, weight, total)
    out = (split * tl.num_programs(0) + row).to(tl.int64) * kv_heads * group + query
    tl.store(partial + out[:, None] * head_dim + column[None, :], attended, mask=inside)
    tl.store(partial_lse + out, lse, mask=member < group)


def decode_attention(
    q: torch.Tensor,
    pool: DevicePool,
    layer: int,
    tables: torch.Tensor,
    contexts: torch.Tensor,
    out: torch.Tensor,
    n_splits: int,
    split_tokens: int = SPLIT_TOKENS,
) -> None:
    """Fill `out` [row, heads, head_dim], contiguous, for queries `q` [row, >= heads * head_dim], rows of any stride.

    `tables` [row, blocks] and `contexts` [row] are int32; a context counts the new token, whose key and value are
    stored already. A context of 0 gives zeros. `n_splits * split_tokens` covers the longest context.
    """
    geometry = pool.geometry
    rows, heads, head_dim = out.shape
    if not rows:
        return
    group = heads // geometry.kv_heads
    partial = torch.empty(n_splits, rows, heads, head_dim, dtype=torch.float32, device=q.device)
    lses = torch.empty(n_splits, rows, heads, dtype=torch.float32, device=q.device)
    _decode_kernel[(rows, geometry.kv_heads, n_splits)](
        q,
        partial,
        lses,
        pool.numbers,
        pool.scales,
        tables,
        contexts,
        head_dim**-0.5,
        layer * pool.layer_pages,
        q.stride(0),
        tables.stride(0),
        split_tokens,
        group=group,
        head_dim=head_dim,
        block_size=geometry.block_size,
        kv_heads=geometry.kv_heads,
        block_pages=pool.block_pages,
        quantised=pool.is_quantised,
        tile=_TILE,
        block_m=padded(group),
        block_d=padded(head_dim),
        dot_type=TRITON_DTYPES[dot_dtype(q, geometry)],
    )
    merge(partial.view(n_splits, rows * heads, head_dim), lses.view(n_splits, -1), out.view(rows * heads, head_dim))


def decode_attention_reference(
    q: torch.Tensor,
    pool: DevicePool,
    layer: int,
    tables: torch.Tensor,
    contexts: torch.Tensor,
    out: torch.Tensor,
    n_splits: int,
    split_tokens: int = SPLIT_TOKENS,
) -> None:
    """The same in torch, without splits."""
    del n_splits, split_tokens
    _, heads, head_dim = out.shape
    group = heads // pool.geometry.kv_heads
    for row, (table, context) in enumerate(zip(tables, contexts.tolist(), strict=True)):
        out[row] = 0.0
        if context:
            n_blocks = -(-context // pool.geometry.block_size)
            k, v = gather_reference(pool, layer, table[:n_blocks], context, torch.float32)
            query = q[row, : heads * head_dim].float().view(heads, head_dim)
            keys, values = (x.repeat_interleave(group, dim=1) for x in (k, v))
            scores = torch.einsum("hd,nhd->hn", query, keys) * head_dim**-0.5
            out[row] = torch.einsum("hn,nhd->hd", scores.softmax(dim=1), values).to(out.dtype)
