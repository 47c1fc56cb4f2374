"""Loads tiles of keys and values through a block table, and the online softmax over them; shared by both attentions."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from covey.model.pool import Geometry

DOT_MIN = 16
"""No side of a matrix product on tensor cores may be shorter."""


@triton.jit
def attend_tile(
    q,
    top,
    weight,
    total,
    numbers,
    scales,
    page,
    within,
    column,
    seen,
    visible,
    softmax_scale,
    head_dim: tl.constexpr,
    block_size: tl.constexpr,
    value_pages: tl.constexpr,
    page_stride: tl.constexpr,
    scale_stride: tl.constexpr,
    scale_offset: tl.constexpr,
    quantised: tl.constexpr,
):
    """Go on with the softmax of queries `q` [m, d] over the tokens at `page` and `within` [t].

    `seen` [t] are tokens that exist, `visible` [m, t] those that a query may see. The state is the highest score, the
    sum of weights and the weighted sum of values. A key page is transposed; its scales multiply whole columns of the
    scores, and those of the values the weights, so that stored numbers go into the products as they are.
    """
    is_column = column < head_dim
    at = numbers + page * page_stride + within
    k = tl.load(at[None, :] + column[:, None] * block_size, mask=is_column[:, None] & seen[None, :], other=0.0)
    scores = tl.dot(q, k.to(q.dtype), input_precision="ieee") * softmax_scale
    if quantised:
        scores *= tl.load(scales + page * scale_stride + scale_offset + within, mask=seen, other=0.0)[None, :]
    scores = tl.where(visible, scores, float("-inf"))
    higher = tl.maximum(top, tl.max(scores, axis=1))
    base = tl.where(higher == float("-inf"), 0.0, higher)
    fade = tl.exp(top - base)
    weights = tl.exp(scores - base[:, None])
    weight = weight * fade + tl.sum(weights, axis=1)
    page += value_pages
    at = numbers + page * page_stride + within * head_dim
    v = tl.load(at[:, None] + column[None, :], mask=seen[:, None] & is_column[None, :], other=0.0)
    if quantised:
        weights *= tl.load(scales + page * scale_stride + scale_offset + within, mask=seen, other=0.0)[None, :]
    total = total * fade[:, None] + tl.dot(weights.to(q.dtype), v.to(q.dtype), input_precision="ieee")
    return higher, weight, total


@triton.jit
def table_entries(table, token, seen, block_size: tl.constexpr, block_pages: tl.constexpr):
    """The first page of the block of each token, and the token's place in its block."""
    block = tl.load(table + token // block_size, mask=seen, other=0).to(tl.int64)
    return block * block_pages, token % block_size


def dot_dtype(q: torch.Tensor, geometry: Geometry) -> torch.dtype:
    """What the products run in: exact for fp32 queries, else fp16, which holds fp16 and int8 numbers as they are."""
    return torch.float32 if q.dtype == torch.float32 or geometry.kv_dtype == "fp32" else torch.float16


def padded(size: int) -> int:
    """The side of a product that holds `size` entries."""
    return max(DOT_MIN, triton.next_power_of_2(size))


TRITON_DTYPES = {torch.float32: tl.float32, torch.float16: tl.float16}
"""Triton's names of what the products run in."""
