"""RMSNorm with its residual, and rotary heads: kernels against their torch references."""

from __future__ import annotations

import pytest
import torch

from covey.model.gpu.kernels.norm import add_rms_norm, add_rms_norm_reference
from covey.model.gpu.kernels.rotary import rotate_heads, rotate_heads_reference

from .pools import source

CLOSE = {torch.float32: 5e-6, torch.float16: 4e-3, torch.bfloat16: 4e-2}
"""Largest difference; outputs reach about 4, where one step of bf16 is 0.03."""


@pytest.mark.parametrize("dtype", CLOSE)
@pytest.mark.parametrize("with_delta", [False, True])
@pytest.mark.parametrize(("n", "width"), [(1, 64), (7, 48), (3, 576)])
def test_norm_equals_the_reference(n: int, width: int, with_delta: bool, dtype: torch.dtype) -> None:
    generator = source(n)
    hidden = torch.randn(n, width, generator=generator) * 5
    delta = torch.randn(n, width, generator=generator).to(dtype) if with_delta else None
    weight = torch.rand(width, generator=generator) + 0.5
    expected_hidden = hidden.clone()
    found = add_rms_norm(hidden, delta, weight, 1e-5, dtype)
    expected = add_rms_norm_reference(expected_hidden, delta, weight, 1e-5, dtype)
    assert found.dtype == dtype
    torch.testing.assert_close(found, expected, rtol=0, atol=CLOSE[dtype])
    assert torch.equal(hidden, expected_hidden)


@pytest.mark.parametrize("dtype", CLOSE)
@pytest.mark.parametrize("with_norm", [False, True])
@pytest.mark.parametrize(("n", "q_heads", "kv_heads", "head_dim"), [(1, 2, 1, 16), (19, 3, 1, 24), (16, 4, 2, 8)])
def test_rotary_equals_the_reference(
    n: int, q_heads: int, kv_heads: int, head_dim: int, with_norm: bool, dtype: torch.dtype
) -> None:
    generator = source(n)
    wide = torch.randn(n, (q_heads + 2 * kv_heads) * head_dim, generator=generator).to(dtype)
    mine, reference = wide.clone(), wide.clone()
    angles = torch.rand(n, head_dim // 2, generator=generator) * 1000
    weights = torch.rand(2, head_dim, generator=generator) + 0.5
    norms = (weights[0], weights[1]) if with_norm else None
    rotate_heads(mine, angles.cos(), angles.sin(), q_heads, kv_heads, norms, 1e-6)
    rotate_heads_reference(reference, angles.cos(), angles.sin(), q_heads, kv_heads, norms, 1e-6)
    torch.testing.assert_close(mine, reference, rtol=0, atol=CLOSE[dtype])
    turned = (q_heads + kv_heads) * head_dim
    assert torch.equal(mine[:, turned:], wide[:, turned:]), "values do not turn"
    assert not torch.equal(mine[:, :turned], wide[:, :turned])
