"""Rotary embedding turns scores into functions of distance."""

from __future__ import annotations

import torch

from covey.model.rotary import rotary_phases, rotate


def test_rotation_depends_on_the_distance_only() -> None:
    source = torch.Generator().manual_seed(2)
    q, k = torch.randn(1, 1, 8, generator=source), torch.randn(1, 1, 8, generator=source)
    frequencies = torch.tensor([1.0, 0.3, 0.1, 0.01])

    def score(at: float, other: float) -> torch.Tensor:
        left = rotate(q, rotary_phases(torch.tensor([at]), frequencies))
        right = rotate(k, rotary_phases(torch.tensor([other]), frequencies))
        return (left * right).sum()

    torch.testing.assert_close(score(7.0, 3.0), score(104.0, 100.0), atol=1e-4, rtol=0)
    torch.testing.assert_close(score(5.0, 5.0), (q * k).sum(), atol=1e-5, rtol=0)
    assert abs(float(score(7.0, 3.0) - score(7.0, 4.0))) > 1e-3
