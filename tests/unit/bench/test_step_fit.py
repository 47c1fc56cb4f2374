"""The growth of a step: the fit finds what made the points; arithmetic follows the machine's limits."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.limit import Limits, attention_operations, decode_weights
from benchmarks.step_fit import GRID, Growth, Point, arithmetic, fit
from covey.model.source import resolve

SECONDS = st.floats(1e-3, 1e-1)


@given(SECONDS, st.floats(1e-5, 1e-2), st.floats(1e-7, 1e-5))
def test_the_fit_finds_what_made_the_points(base_s: float, row_s: float, token_s: float) -> None:
    true = Growth(base_s=base_s, row_s=row_s, token_s=token_s, r2=1.0)
    found = fit([Point(rows=rows, context=context, seconds=true.seconds(rows, context)) for rows, context in GRID])
    assert found.base_s == pytest.approx(base_s, rel=1e-3)
    assert found.row_s == pytest.approx(row_s, rel=1e-3, abs=1e-7)
    assert found.token_s == pytest.approx(token_s, rel=1e-3, abs=1e-9)
    assert found.r2 == pytest.approx(1.0)


def test_points_off_the_plane_lower_the_share_that_is_explained() -> None:
    points = [Point(rows=rows, context=context, seconds=0.01 * rows**2) for rows, context in GRID]
    assert fit(points).r2 < 0.99


def test_arithmetic_is_reads_and_products() -> None:
    config = resolve("smollm2").config()
    limits = Limits(read_bytes_per_s=25e9, operations_per_s={"fp32": 100e9, "int8": 400e9})
    fp32 = arithmetic(config, limits, "fp32", 46080.0)
    assert fp32.base_s == pytest.approx(4 * decode_weights(config) / 25e9)
    assert fp32.row_s == pytest.approx(2 * decode_weights(config) / 100e9)
    assert fp32.token_s == pytest.approx(max(46080 / 25e9, attention_operations(config) / 100e9))
    int8 = arithmetic(config, limits, "int8", 11520.0)
    assert int8.base_s == pytest.approx(fp32.base_s / 4)
    assert int8.row_s == pytest.approx(fp32.row_s / 4)
