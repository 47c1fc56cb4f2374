"""Figures from samples of known times; a ratio over 1 means that Covey is better, for times and for rates."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.figures import ALONE, Goal, Measured, add_ratios, add_rows, output_tokens_per_s
from benchmarks.load import Sample
from benchmarks.report import Report

from .slow_server import sample


def measured(first_s: float, gap_s: float, *, rounds: int = 1, tokens: int = 11) -> Measured:
    """Two requests, ten seconds apart, in each round and case."""
    found = Measured()
    for _ in range(rounds):
        found.add_start(4.0, {"total": 2**30})
        for case in (ALONE, "0.5rps"):
            found.add(case, [sample(started=at, first_s=first_s, gap_s=gap_s, tokens=tokens) for at in (0.0, 10.0)])
    return found


def rows_of(report: Report, case: str) -> dict[str, float]:
    return {row.metric: row.value for row in report.rows if row.case == case}


def test_rows_are_the_figures_of_the_samples() -> None:
    report = Report("serve")
    add_rows(report, "covey", measured(0.5, 0.1), Goal())
    found = rows_of(report, "0.5rps")
    assert found["ttft_s"] == pytest.approx(0.5)
    assert found["tpot_s_p50"] == pytest.approx(0.1)
    assert found["itl_s_p99"] == pytest.approx(0.1)
    assert found["e2e_s"] == pytest.approx(1.5)
    assert found["output_tokens_per_s"] == pytest.approx(22 / 11.5)
    assert (found["goodput"], found["failed"]) == (1.0, 0.0)
    assert rows_of(report, ALONE)["decode_tokens_per_s"] == pytest.approx(10.0)
    assert rows_of(report, "start") == {"ready_s": 4.0}
    assert rows_of(report, "idle") == {"pss_total": 1024.0}


def test_a_failed_request_is_counted_and_meets_no_goal() -> None:
    found = Measured()
    good = sample(started=0.0, first_s=0.5, gap_s=0.1, tokens=11)
    late = sample(started=0.0, first_s=2.5, gap_s=0.1, tokens=11)
    slow = sample(started=0.0, first_s=0.5, gap_s=0.3, tokens=11)
    found.add("1rps", [good, late, slow, Sample(started=0.0, ended=1.0, error="Unavailable")])
    report = Report("serve")
    add_rows(report, "covey", found, Goal())
    assert rows_of(report, "1rps")["goodput"] == pytest.approx(0.25)
    assert rows_of(report, "1rps")["failed"] == 1.0
    assert rows_of(report, "1rps")["ttft_s"] == pytest.approx((0.5 + 2.5 + 0.5) / 3)


def test_names_and_directions_of_ratios() -> None:
    report = Report("serve")
    add_ratios(report, "vllm", measured(0.5, 0.1), measured(1.0, 0.3))
    assert set(report.ratios) == {
        "ttft_s/b1/vllm", "tpot_s/b1/vllm", "e2e_s/b1/vllm", "decode_tokens_per_s/b1/vllm",
        "ttft_s/0.5rps/vllm", "tpot_s/0.5rps/vllm", "e2e_s/0.5rps/vllm", "output_tokens_per_s/0.5rps/vllm",
    }  # fmt: skip
    assert report.ratios["ttft_s/0.5rps/vllm"] == pytest.approx(2.0)
    assert report.ratios["tpot_s/0.5rps/vllm"] == pytest.approx(3.0)
    assert report.ratios["e2e_s/0.5rps/vllm"] == pytest.approx(4.0 / 1.5)
    assert report.ratios["decode_tokens_per_s/b1/vllm"] == pytest.approx(3.0)
    assert report.ratios["output_tokens_per_s/0.5rps/vllm"] == pytest.approx(14.0 / 11.5)


@given(st.floats(0.01, 5.0), st.floats(0.01, 5.0))
def test_swapping_the_two_inverts_every_ratio(a: float, b: float) -> None:
    there, back = Report("serve"), Report("serve")
    add_ratios(there, "vllm", measured(a, a), measured(b, b))
    add_ratios(back, "vllm", measured(b, b), measured(a, a))
    for name, ratio in there.ratios.items():
        assert ratio * back.ratios[name] == pytest.approx(1.0)
        assert (ratio >= 1.0) == (a <= b) or ratio == pytest.approx(1.0)


def test_a_ratio_is_the_median_of_the_rounds() -> None:
    ours, theirs, report = Measured(), Measured(), Report("serve")
    for peer_first_s in (1.0, 50.0, 2.0):
        ours.add("1rps", [sample(started=0.0, first_s=1.0, gap_s=0.1, tokens=5)])
        theirs.add("1rps", [sample(started=0.0, first_s=peer_first_s, gap_s=0.1, tokens=5)])
    add_ratios(report, "vllm", ours, theirs)
    assert report.ratios["ttft_s/1rps/vllm"] == pytest.approx(2.0)


def test_a_round_without_answers_gives_no_ratio() -> None:
    ours, theirs, report = measured(0.5, 0.1), Measured(), Report("serve")
    theirs.add("0.5rps", [Sample(started=0.0, ended=1.0, error="ConnectError")])
    add_ratios(report, "vllm", ours, theirs)
    assert report.ratios == {}


def test_throughput_counts_from_the_first_departure_to_the_last_end() -> None:
    samples = [sample(started=at, first_s=1.0, gap_s=0.5, tokens=3) for at in (5.0, 7.0)]
    assert output_tokens_per_s(samples) == pytest.approx(6 / 4.0)
