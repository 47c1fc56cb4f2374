"""Turns query and key heads by their positions, in place; a head's rotary pairs are adjacent.

Qwen3 normalises each head before it turns; that is fused, as the head is in registers anyway.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_TILE = 16
"""Tokens a program handles."""


@triton.jit
def _rotary_kernel(
    qkv,
    cosines,
    sines,
    q_norm,
    k_norm,
    n,
    stride,
    q_heads,
    pairs,
    eps,
    tile: tl.constexpr,
    block: tl.constexpr,
    with_norm: tl.constexpr,
):
    token = tl.program_id(0) * tile + tl.arange(0, tile)
    head = tl.program_id(1)
    pair = tl.arange(0, block)
    inside = (token < n)[:, None] & (pair < pairs)[None, :]
    at = qkv + token.to(tl.int64)[:, None] * stride + (head * 2 * pairs + 2 * pair)[None, :]
    even = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    odd = tl.load(at + 1, mask=inside, other=0.0).to(tl.float32)
    if with_norm:
        squares = tl.sum(even * even + odd * odd, axis=1)
        scale = (1.0 / tl.sqrt(squares / (2 * pairs) + eps))[:, None]
        weight = k_norm + 2 * pair
        if head < q_heads:
            weight = q_norm + 2 * pair
        even = even * scale * tl.load(weight, mask=pair < pairs, other=0.0)[None, :]
        odd = odd * scale * tl.load(weight + 1, mask=pair < pairs, other=0.0)[None, :]
    phase = token.to(tl.int64)[:, None] * pairs + pair[None, :]
    cosine = tl.load(cosines + phase, mask=inside, other=0.0)
    sine = tl.load(sines + phase, mask=inside, other=0.0)
    tl.store(at, (even * cosine - odd * sine).to(qkv.dtype.element_ty), mask=inside)
    tl.store(at + 1, (even * sine + odd * cosine).to(qkv.dtype.element_ty), mask=inside)


def rotate_heads(
    qkv: torch.Tensor,
    cosines: torch.Tensor,
    sines: torch.Tensor,
    q_heads: int,
    kv_heads: int,
    norms: tuple[torch.Tensor, torch.Tensor] | None = None,
    eps: float = 0.0,
) -> None:
    """Turn the query and key heads of fused rows `qkv` [n, (q, k, v) heads * head_dim] in place.

    `cosines` and `sines` are [n, head_dim / 2] in fp32. `norms` are the fp32 weights of the query and key heads' own
    normalisation.
    """
    n, pairs = cosines.shape
    if n:
        q_norm, k_norm = norms if norms is not None else (cosines, cosines)
        _rotary_kernel[(triton.cdiv(n, _TILE), q_heads + kv_heads)](
            qkv,
            cosines,
            sines,
            q_norm,
            k_norm,
            n,
            qkv.stride(0),
            q_heads,
            pairs,
            eps,
            tile=_TILE,
            block=triton.next_power_of_2(pairs),
            with_norm=norms is not None,
        )


def rotate_heads_reference(
    qkv: torch.Tensor,
    cosines: torch.Tensor,
    sines: torch.Tensor,
    q_heads: int,
    kv_heads: int,
    norms: tuple[torch.Tensor, torch.Tensor] | None = None,
    eps: float = 0.0,
) -> None:
    """The same in torch."""
    n, pairs = cosines.shape
    turning = qkv.view(n, -1, 2 * pairs)[:, : q_heads + kv_heads]
    heads = turning.float()
    if norms is not None:
        q, k = heads[:, :q_heads], heads[:, q_heads:]
        normed = [torch.nn.functional.rms_norm(x, w.shape, w, eps) for x, w in zip((q, k), norms, strict=True)]
        heads = torch.cat(normed, dim=1)
    phases = torch.complex(cosines, sines)[:, None, :]
    turned = torch.view_as_complex(heads.reshape(n, -1, pairs, 2).contiguous()) * phases
    turning.copy_(torch.view_as_real(turned).reshape(turning.shape))
