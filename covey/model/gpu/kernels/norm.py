"""Root-mean-square normalisation fused with the addition to the residual stream before it."""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def _norm_kernel(hidden, delta, weight, out, width, eps, block: tl.constexpr, with_delta: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * width
    column = tl.arange(0, block)
    inside = column < width
    x = tl.load(hidden + at + column, mask=inside, other=0.0)
    if with_delta:
        x += tl.load(delta + at + column, mask=inside, other=0.0).to(tl.float32)
        tl.store(hidden + at + column, x, mask=inside)
    scale = 1.0 / tl.sqrt(tl.sum(x * x, axis=0) / width + eps)
    normed = x * scale * tl.load(weight + column, mask=inside, other=0.0)
    tl.store(out + at + column, normed.to(out.dtype.element_ty), mask=inside)


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
        added = hidden if delta is None else delta
        _norm_kernel[(n,)](hidden, added, weight, out, width, eps, block=block, with_delta=delta is not None)
    return out


def add_rms_norm_reference(
    hidden: torch.Tensor, delta: torch.Tensor | None, weight: torch.Tensor, eps: float, dtype: torch.dtype
) -> torch.Tensor:
    """The same in torch."""
    if delta is not None:
        hidden.add_(delta)
    return torch.nn.functional.rms_norm(hidden, weight.shape, weight, eps).to(dtype)
