"""Merges attention over shards of the keys: the partial outputs of split-KV decoding, or of several workers.

Infinite-LLM (DistAttention) and Lamina §4.2.2: with shard outputs o_k and log-sum-exps lse_k of their scores,
M = max lse_k, w_k = exp(lse_k - M), o = sum(w_k o_k) / sum(w_k), lse = M + log(sum(w_k)). The rule is associative and
commutative; a shard without keys has lse = -inf and changes nothing.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def _merge_kernel(partial, partial_lse, out, lse, shards, n, width, block: tl.constexpr, with_lse: tl.constexpr):
    row = tl.program_id(0)
    column = tl.arange(0, block)
    inside = column < width
    top = tl.full((1,), float("-inf"), tl.float32)
    weight = tl.zeros((1,), tl.float32)
    total = tl.zeros((block,), tl.float32)
    # One shard after the other: trailing empty shards then change no bit, so a row is the same in a wider batch.
    for shard in range(shards):
        at = row.to(tl.int64) + shard * n
        found = tl.load(partial_lse + at + tl.zeros((1,), tl.int32))
        higher = tl.maximum(top, found)
        base = tl.where(higher == float("-inf"), 0.0, higher)
        old, new = tl.exp(top - base), tl.exp(found - base)
        values = tl.load(partial + at * width + column, mask=inside, other=0.0).to(tl.float32)
        total = total * old + values * new
        weight = weight * old + new
        top = higher
    is_empty = weight == 0.0
    safe = tl.where(is_empty, 1.0, weight)
    tl.store(out + row.to(tl.int64) * width + column, (total / safe).to(out.dtype.element_ty), mask=inside)
    if with_lse:
        tl.store(lse + row + tl.zeros((1,), tl.int32), tl.where(is_empty, float("-inf"), top + tl.log(safe)))


def merge(partial: torch.Tensor, partial_lse: torch.Tensor, out: torch.Tensor, lse: torch.Tensor | None = None) -> None:
    """Fill `out` [n, width], and `lse` [n] where given, from `partial` [shard, n, width] and `partial_lse` [shard, n].

    Everything is contiguous, log-sum-exps are fp32. Without any key a row is 0 and its lse -inf.
    """
    shards, n, width = partial.shape
    if n:
        _merge_kernel[(n,)](
            partial,
            partial_lse,
            out,
            partial_lse if lse is None else lse,
            shards,
            n,
            width,
            block=triton.next_power_of_2(width),
            with_lse=lse is not None,
        )


def merge_reference(
    partial: torch.Tensor, partial_lse: torch.Tensor, out: torch.Tensor, lse: torch.Tensor | None = None
) -> None:
    """The same in torch."""
    merged, found = merge_shards(partial.float(), partial_lse)
    out.copy_(merged)
    if lse is not None:
        lse.copy_(found)


def merge_shards(outputs: torch.Tensor, lses: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The merged output [..., width] and log-sum-exp [...] of `outputs` [shard, ..., width] and `lses` [shard, ...].

    The plain form of the rule, for partial outputs that arrive from other workers.
    """
    top = lses.amax(dim=0)
    base = torch.where(top == -torch.inf, 0.0, top)
    weights = torch.exp(lses - base)
    weight = weights.sum(dim=0)
    is_empty = weight == 0
    safe = torch.where(is_empty, 1.0, weight)
    merged = (outputs * weights[..., None]).sum(dim=0) / safe[..., None]
    return merged, torch.where(is_empty, -torch.inf, base + safe.log())
