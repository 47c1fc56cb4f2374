"""Rows carry a statistic and an interval that holds it; the JSON object has the shape that every benchmark shares."""

from __future__ import annotations

import json
from io import StringIO
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from benchmarks.report import Report, interval, statistic

TIMES = st.lists(st.floats(min_value=0.001, max_value=100.0), min_size=1, max_size=30)


@pytest.mark.parametrize(("at", "expected"), [("mean", 22.0), ("p50", 3.0), ("p99", 96.16)])
def test_statistics_are_what_their_names_say(at: str, expected: float) -> None:
    assert statistic([1.0, 2.0, 3.0, 4.0, 100.0], at) == pytest.approx(expected)


@given(TIMES, st.sampled_from(["mean", "p50", "p99"]))
def test_an_interval_lies_within_the_samples_and_is_reproducible(samples: list[float], at: str) -> None:
    value, lo, hi = interval(samples, at)
    slack = 1e-9 * max(samples)
    assert min(samples) - slack <= lo <= hi <= max(samples) + slack
    assert min(samples) - slack <= value <= max(samples) + slack
    assert interval(samples, at) == (value, lo, hi)


def test_more_samples_narrow_the_interval() -> None:
    few, many = [1.0, 2.0, 3.0, 4.0], [1.0, 2.0, 3.0, 4.0] * 25
    _, few_lo, few_hi = interval(few, "mean")
    value, lo, hi = interval(many, "mean")
    assert lo < value < hi
    assert hi - lo < (few_hi - few_lo) / 2


def test_the_object_names_what_was_measured_and_on_what() -> None:
    report = Report("serve")
    report.add(case="0.5rps", system="covey", metric="ttft_s", unit="s", samples=[0.1, 0.3], at="p99")
    report.add(case="0.5rps", system="covey", metric="ttft_s", unit="s", samples=[])
    report.ratios["ttft_s/0.5rps/vllm"] = 2.0
    found = json.loads(report.json())
    assert set(found) == {"bench", "version", "date", "machine", "rows", "ratios"}
    assert found["machine"]["cores"] > 0
    assert found["ratios"] == {"ttft_s/0.5rps/vllm": 2.0}
    (row,) = found["rows"]
    assert set(row) == {"case", "system", "metric", "unit", "value", "lo", "hi", "n"}
    assert (row["metric"], row["n"]) == ("ttft_s_p99", 2)


def test_a_figure_can_be_asked_for() -> None:
    report = Report("serve")
    report.add(case="b1", system="limit", metric="decode_tokens_per_s", unit="tokens/s", samples=[46.0])
    assert report.value(case="b1", system="limit", metric="decode_tokens_per_s") == 46.0
    assert report.value(case="b1", system="covey", metric="decode_tokens_per_s") is None


def test_the_table_shows_rows_and_ratios_and_the_file_holds_the_object(tmp_path: Path) -> None:
    report = Report("serve")
    report.add(case="start", system="covey", metric="ready_s", unit="s", samples=[12.5])
    report.ratios["ttft_s/b1/vllm"] = 1.25
    console = Console(file=StringIO(), width=160)
    report.print(console)
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert "ready_s" in shown
    assert "12.5 s" in shown
    assert "ttft_s/b1/vllm" in shown
    report.write(str(tmp_path / "result.json"))
    assert json.loads((tmp_path / "result.json").read_text())["rows"][0]["value"] == 12.5
