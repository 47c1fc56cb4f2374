"""What `covey bench kv` reports: the names that its readers rely on, and which way a ratio points."""

from __future__ import annotations

from itertools import product

import pytest

from benchmarks.drivers.kv_load import blocks_of, together
from benchmarks.kv_cases import LOOKUPS, loads
from benchmarks.kv_figures import Figures
from benchmarks.kv_placement import moved_share
from benchmarks.report import Report


def test_ratios_have_the_agreed_names_and_over_one_means_that_ours_is_better() -> None:
    figures = Figures(versions={"covey": "1", "valkey": "redis 7"})
    for load, operation in product(loads(), ("put", "get")):
        for transport in ("shm", "grpc", "tcp"):
            figures.ours[operation, load, transport] += [2e9, 4e9, 3e9]
        figures.theirs["valkey", operation, load] += [1e9, 1e9, 2e9]
        figures.theirs["mooncake", operation, load] += [4e9]
        figures.memcpy[load] += [8e9, 8e9, 8e9]
    for blocks in LOOKUPS:
        figures.lookups_s[blocks] += [2e-3]
        figures.empty_calls_s[blocks] += [1e-3]
        figures.rpcs_s[blocks] += [1.5e-3]
    report = Report("kv")
    figures.write(report)
    for operation, size, transport in product(("put", "get"), ("64kib", "1mib", "4mib"), ("shm", "grpc", "tcp")):
        name = f"{operation}_bytes_per_s/{size}-{transport}"
        assert report.ratios[f"{name}/valkey"] == pytest.approx(2.0), "the median of the rounds' ratios"
        assert report.ratios[f"{name}/mooncake"] == pytest.approx(0.5)
        assert report.ratios[f"{name}/limit"] == pytest.approx(3 / 8)
    assert {f"lookup_s/{blocks}-blocks/limit": 0.5 for blocks in (1, 100, 1000)}.items() <= report.ratios.items()
    assert any(row.system == "valkey (redis 7)" for row in report.rows), "the row says which engine it was"


def test_a_peer_that_is_not_there_has_no_ratio() -> None:
    figures = Figures()
    figures.ours["get", loads()[0], "shm"] += [1.0]
    report = Report("kv")
    figures.write(report)
    assert not [name for name in report.ratios if name.endswith(("/valkey", "/mooncake", "/limit"))]


def test_a_fourth_node_moves_about_a_quarter_of_the_blocks() -> None:
    assert 0.23 < moved_share(3, 4) <= 0.27


def test_a_batch_is_at_most_64_blocks_and_64_mib() -> None:
    assert [blocks_of(size) for size in (64 << 10, 1 << 20, 4 << 20, 1 << 30)] == [64, 64, 16, 1]


def test_what_a_client_raises_is_raised() -> None:
    def work(number: int) -> None:
        if number == 2:
            raise RuntimeError("the third one")

    with pytest.raises(RuntimeError, match="third"):
        together(4, work)
    assert together(2, lambda _: None) >= 0
