"""The lines through measured points, and where they cross; a whole measurement is left to the benchmark itself."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.kv_break_even import Point, fitted
from benchmarks.kv_split import add_rows, plot
from benchmarks.report import Report


def points(fixed_s: float, s_per_loaded: float, s_per_token: float) -> list[Point]:
    return [
        Point(
            tokens=n,
            layers_s=0.03,
            whole_s=0.04,
            prefill_s=0.02 + s_per_token * n,
            layers_wait_s=fixed_s + s_per_loaded * n,
            whole_wait_s=1.0,
        )
        for n in (64, 256, 1000)
    ]


def test_the_crossing_point_is_found() -> None:
    found = fitted(points(0.1, 0.0005, 0.002), "auto")
    assert found.s_per_token == pytest.approx(0.002)
    assert found.factor == pytest.approx(0.25)
    assert found.fixed_tokens == pytest.approx(50)
    assert found.tokens == pytest.approx(50 / 0.75)


def test_loading_that_costs_more_than_computing_never_pays() -> None:
    assert fitted(points(0.0, 0.003, 0.002), "grpc").tokens == float("inf")


def test_one_length_makes_no_line() -> None:
    with pytest.raises(ValueError, match="two lengths"):
        fitted(points(0.1, 0.0, 0.002)[:1], "auto")


def test_rows_and_plot_say_what_was_found(tmp_path: Path) -> None:
    report, found = Report("kv"), fitted(points(0.1, 0.0005, 0.002), "auto")
    add_rows(report, "shm", found)
    assert report.value(case="shm", system="covey", metric="break_even_tokens") == pytest.approx(50 / 0.75)
    assert report.value(case="1000-shm", system="covey", metric="prefill_s") == pytest.approx(2.02)
    assert report.ratios["first_token_s/1000-shm/prefill"] == pytest.approx(2.02 / 0.03)
    plot(tmp_path / "plots" / "crossing.png", {"shm": found})
    assert (tmp_path / "plots" / "crossing.png").stat().st_size > 1000
