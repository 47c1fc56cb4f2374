"""Loads tiles of keys and values through a block table, and the online softmax over them; shared by both attentions."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from covey.model.pool import Geometry

DOT_MIN = 16
"""No side of a matrix product on tensor cores may be shorter."""


@triton.jit
def no_tokens(block_m: tl.constexpr, block_d: tl.constexpr):
    """The state of a softmax that has seen nothing: the highest score, the sum of weights, the weighted values."""
    top = tl.full((block_m,), float("-inf"), tl.float32)
    return top, tl.zeros((block_m,), tl.float32), tl.zeros((block_m, block_d), tl.float32)


@triton.jit
def attend_tile(
    q,
    top,
    weight,
    total,
    numbers,
    scales,
    table,
    token,
    end,
    limit,
    page,
    column,
    softmax_scale,
    head_dim: tl.constexpr,
    block_size: tl.constexpr,
    kv_heads: tl.constexpr,
    block_pages: tl.constexpr,
    quantised: tl.constexpr,
):
    """Go on with the softmax of queries `q` [m, d] over positions `token` [t], of which those before `end` exist.

    A query sees positions up to its `limit`, [m, 1] or one for all; `page` is the one of head and layer in a block. A
    key page is transposed. Its scales multiply whole columns of the scores, and those of the values the weights, so
    that stored numbers go into the products as they are.
    """
    page_size: tl.constexpr = block_size * head_dim
    page_stride: tl.constexpr = page_size + 4 * block_size if quantised else page_size
    seen = token < end
    is_column = column < head_dim
    page += tl.load(table + token // block_size, mask=seen, other=0).to(tl.int64) * block_pages
    within = token % block_size
    at = numbers + page * page_stride + within
    k = tl.load(at[None, :] + column[:, None] * block_size, mask=is_column[:, None] & seen[None, :], other=0.0)
    scores = tl.dot(q, k.to(q.dtype), input_precision="ieee") * softmax_scale
    at_scale = scales + page * (page_stride // 4) + page_size // 4 + within
    if quantised:
        scores *= tl.load(at_scale, mask=seen, other=0.0)[None, :]
    scores = tl.where(seen[None, :] & (token[None, :] <= limit), scores, float("-inf"))
    higher = tl.maximum(top, tl.max(scores, axis=1))
    base = tl.where(higher == float("-inf"), 0.0, higher)
    fade = tl.exp(top - base)
    weights = tl.exp(scores - base[:, None])
    weight = weight * fade + tl.sum(weights, axis=1)
    at = numbers + (page + kv_heads) * page_stride + within * head_dim
    v = tl.load(at[:, None] + column[None, :], mask=seen[:, None] & is_column[None, :], other=0.0)
    if quantised:
        weights *= tl.load(at_scale + kv_heads * (page_stride // 4), mask=seen, other=0.0)[None, :]
    total = total * fade[:, None] + tl.dot(weights.to(q.dtype), v.to(q.dtype), input_precision="ieee")
    return higher, weight, total


@triton.jit
def finished(top, weight, total):
    """The output and the log-sum-exp of each query; 0 and -inf where it saw nothing."""
    is_empty = weight == 0.0
    safe = tl.where(is_empty, 1.0, weight)
    return total / safe[:, None], tl.where(is_empty, float("-inf"), top + tl.log(safe))


def dot_dtype(q: torch.Tensor, geometry: Geometry) -> torch.dtype:
    """What the products run in: exact for fp32 queries, else fp16, which holds fp16 and int8 numbers as they are."""
    return torch.float32 if q.dtype == torch.float32 or geometry.kv_dtype == "fp32" else torch.float16


def padded(size: int) -> int:
    """The side of a product that holds `size` entries."""
    return max(DOT_MIN, int(triton.next_power_of_2(size)))


TRITON_DTYPES = {torch.float32: tl.float32, torch.float16: tl.float16}
"""Triton's names of what the products run in."""
