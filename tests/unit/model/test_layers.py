"""The pieces of a layer equal their textbook formulas in every shape that takes another path."""

from __future__ import annotations

import pytest
import torch

from covey.model.layers import Scratch, add_product, product, rotary_phases, rotate


@pytest.mark.parametrize("rows", [1, 2, 4, 5, 8, 9])
@pytest.mark.parametrize("tall", [False, True])
def test_products_are_the_same_for_any_number_of_rows(rows: int, tall: bool) -> None:
    weight = torch.randn(20000 if tall else 40, 24)
    x, hidden = torch.randn(rows, 24), torch.randn(rows, weight.shape[0])
    out = torch.full_like(hidden, torch.nan)
    product(x, weight, out)
    torch.testing.assert_close(out, x @ weight.t(), atol=1e-4, rtol=0)
    before = hidden.clone()
    add_product(hidden, x, weight)
    torch.testing.assert_close(hidden, before + x @ weight.t(), atol=1e-4, rtol=0)


def test_rotation_depends_on_the_distance_only() -> None:
    source = torch.Generator().manual_seed(2)
    q, k = torch.randn(1, 1, 8, generator=source), torch.randn(1, 1, 8, generator=source)
    frequencies = torch.tensor([1.0, 0.3, 0.1, 0.01])

    def score(at: float, other: float) -> torch.Tensor:
        left, right = q.clone(), k.clone()
        rotate(left, rotary_phases(torch.tensor([at]), frequencies))
        rotate(right, rotary_phases(torch.tensor([other]), frequencies))
        return (left * right).sum()

    torch.testing.assert_close(score(7.0, 3.0), score(104.0, 100.0), atol=1e-4, rtol=0)
    torch.testing.assert_close(score(5.0, 5.0), (q * k).sum(), atol=1e-5, rtol=0)
    assert abs(float(score(7.0, 3.0) - score(7.0, 4.0))) > 1e-3


def test_scratch_memory_is_reused() -> None:
    scratch = Scratch()
    first = scratch.take("a", 8, 4)
    assert scratch.take("a", 2, 3).data_ptr() == first.data_ptr()
    assert scratch.take("b", 2, 3).data_ptr() != first.data_ptr()
    assert scratch.take("a", 9, 4).shape == (9, 4)
