"""Root-mean-square normalisation fused with the addition to the residual stream before it."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_WORK = 1024
"""Numbers that a program handles at least, where there are so many."""


@triton.jit
def _norm_kernel(
    hidden, delta, weight, out, n, width, eps, tile: tl.constexpr, block: tl.constexpr, with_delta: tl.constexpr
):
    row = tl.program_id(0) * tile + tl.arange(0, tile)
    column = tl.arange(0, block)
    at = row.to(tl.int64)[:, None] * width + column[None, :]
    inside = (row < n)[:, None] & (column < width)[None, :]
    x = tl.load(hidden + at, mask=inside, other=0.0)
    if with_delta:
        x += tl.load(delta + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(hidden + at, x, mask=inside)
    scale = 1.0 / tl.sqrt(tl.sum(x * x, axis=1) / width + eps)
    normed = x * scale[:, None] * tl.load(weight + column, mask=column < width, other=0.0)[None, :]
    tl.store(out + at, normed.to(out.dtype.element_ty), mask=inside)


def add_rms_norm(
    hidden: torch.Tensor, delta: torch.Tensor | None, weight: torch.Tensor, eps: float, dtype: torch.dtype
) -> torch.Tensor:
    """Add `delta` to `hidden` [n, width] (fp32) in place and return the normalised sum as `dtype`.

    `weight` is fp32; `delta` may be of any type.
    """
    n, width = hidden.shape
    out = torch.empty(n, width, dtype=dtype, device=hidden.device)
    if n:
        block = triton.next_power_of_2(width)
        tile = max(1, _WORK // block)  # of the width alone, so that a row is the same in any batch
        added = hidden if delta is None else delta
        _norm_kernel[(triton.cdiv(n, tile),)](
            hidden, added, weight, out, n, width, eps, tile=tile, block=block, with_delta=delta is not None
        )
    return out


def add_rms_norm_reference(
    hidden: torch.Tensor, delta: torch.Tensor | None, weight: torch.Tensor, eps: float, dtype: torch.dtype
) -> torch.Tensor:
    """The same in torch."""
    if delta is not None:
        hidden.add_(delta)
    return torch.nn.functional.rms_norm(hidden, weight.shape, weight, eps).to(dtype)
