"""Ratios of the engine's benchmark: their names, that more is better, the faster setting of a peer, and its doubts."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.contenders import Contender
from benchmarks.engine_cases import cases
from benchmarks.engine_figures import Figures, Rates
from benchmarks.engine_plots import engine_plot
from benchmarks.expected import expected_tokens_per_s
from benchmarks.limit import Limits
from benchmarks.report import Report
from benchmarks.step_fit import GRID, Growth, Point
from covey.model.source import resolve

LIMITS = Limits(read_bytes_per_s=25e9, operations_per_s={"fp32": 100e9, "bf16": 150e9, "int8": 400e9})
CASES = cases(list(range(5000)), steps=64, salt=0)
PRODUCTS = ((128, 1), (512, 1), (1, 1), (8, 8), (32, 32))


def rates(name: str, precision: str, tokens_per_s: list[float], peer: str = "") -> Rates:
    contender = Contender(name=name, precision=precision, peer=peer, command=(), environment={})
    found = Rates(contender=contender, version="1")
    for case in CASES:
        if not (peer and case.ours_only):
            found.rounds[case.name] = list(tokens_per_s)
    return found


def figures(*systems: Rates) -> Figures:
    return Figures(
        config=resolve("smollm2").config(),
        cases=CASES,
        limits=LIMITS,
        rates=list(systems),
        kv_bytes_per_token={"fp32": 46080.0, "int8": 46080.0},
        products_s={(kind, *key): [key[0] / 100.0] * 2 for kind in ("fp32", "int8") for key in PRODUCTS},
        growth={"fp32": (growth(0.04, 0.002, 4e-6), growth(0.02, 0.001, 2e-6))},
    )


def growth(base_s: float, row_s: float, token_s: float) -> Growth:
    return Growth(base_s=base_s, row_s=row_s, token_s=token_s, r2=1.0)


def test_every_ratio_has_the_name_that_was_agreed() -> None:
    report = Report("engine")
    systems = [rates("covey", precision, [100.0] * 2) for precision in ("fp32", "int8")]
    peers = [rates(peer, "fp32", [50.0] * 2, peer) for peer in ("vllm", "transformers", "llamacpp")]
    figures(*systems, *peers).write(report)
    cases_of = {"prefill_tokens_per_s": ("128", "512", "2000"), "decode_tokens_per_s": ("b1", "b8", "b32")}
    against = ("vllm", "transformers", "llamacpp", "products", "limit")
    for metric, names in cases_of.items():
        for name in names:
            for precision in ("fp32", "int8"):
                found = {peer: report.ratios[f"{metric}/{name}-{precision}/{peer}"] for peer in against}
                assert found["vllm"] == pytest.approx(2.0)
                assert found["products"] == pytest.approx(1.0)
                assert found["limit"] > 0
    assert report.ratios["mixed_tokens_per_s/b8-512-fp32/vllm"] == pytest.approx(2.0)
    assert report.ratios["decode_tokens_per_s/b8-schema-int8/unconstrained"] == pytest.approx(1.0)


def test_a_ratio_is_the_median_over_rounds_and_the_peer_runs_in_its_best_setting() -> None:
    report = Report("engine")
    ours = rates("covey", "fp32", [100.0, 100.0, 10.0])
    eager, compiled = (
        rates("vllm-eager", "fp32", [90.0, 90.0, 90.0], "vllm"),
        rates("vllm-compiled", "fp32", [], "vllm"),
    )
    compiled.rounds["b1"] = [400.0, 50.0, 200.0]
    figures(ours, eager, compiled).write(report)
    assert report.ratios["decode_tokens_per_s/b1-fp32/vllm"] == pytest.approx(0.25)
    assert report.ratios["decode_tokens_per_s/b8-fp32/vllm"] == pytest.approx(100.0 / 90.0)


def test_a_case_that_failed_has_no_ratio() -> None:
    report = Report("engine")
    figures(rates("covey", "fp32", []), rates("vllm-eager", "fp32", [], "vllm")).write(report)
    assert not [name for name in report.ratios if "tokens_per_s" in name]


def test_a_slower_growth_than_arithmetic_says_is_below_one() -> None:
    report = Report("engine")
    figures(rates("covey", "fp32", [1.0])).write(report)
    for metric in ("step_s", "step_s_per_row", "step_s_per_context_token"):
        assert report.ratios[f"{metric}/fit-fp32/limit"] == pytest.approx(0.5)


def test_a_peer_far_below_what_it_gave_elsewhere_is_named() -> None:
    due = expected_tokens_per_s("vllm", "b8", LIMITS)
    assert due is not None
    assert due == pytest.approx(86.0 * 100 / 108.5)
    slow, fine = (rates("vllm-eager", "fp32", [share * due], "vllm") for share in (0.7, 0.8))
    for found in (slow, fine):
        found.rounds = {"b8": found.rounds["b8"]}
    assert list(figures(slow).doubts()) == [
        f"vllm is doubtful at b8: {0.7 * due:.3g} tokens/s, {due:.3g} were expected here"
    ]
    assert not list(figures(fine).doubts())
    assert expected_tokens_per_s("llamacpp", "b8", LIMITS) is None


def test_the_plot_is_drawn(tmp_path: Path) -> None:
    found = figures(rates("covey", "fp32", [100.0]), rates("vllm-eager", "fp32", [50.0], "vllm"))
    points = {"fp32": [Point(rows=rows, context=context, seconds=0.05) for rows, context in GRID]}
    engine_plot(tmp_path / "deep" / "engine.png", found, points)
    assert (tmp_path / "deep" / "engine.png").read_bytes().startswith(b"\x89PNG")
