"""Systems are measured in turn with equal requests; a peer that fails is left out, a cached answer ends the run."""

from __future__ import annotations

from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from benchmarks.limit import Limits
from benchmarks.peers import PeerState
from benchmarks.report import Report
from benchmarks.serve import OURS, WARM_UP, ServeBench, add_limit, best_vllm
from benchmarks.workload import AGAINST_PEERS, FULL, QUICK, Workload, workload
from covey.cli.files import MeshFiles
from covey.cli.mesh import MeshPlan
from covey.errors import CoveyError
from covey.model.source import resolve
from covey.testing import VirtualClock, virtual_time

from .slow_server import SlowServer

SMALL = Workload(rates_per_s=(1.0,), requests=6, alone=2, rounds=3)
SOURCE = resolve("smollm2")
CONFIG = SOURCE.config()
PROMPTS = [f"prompt {i}" for i in range(20)]


def bench_of(work: Workload = SMALL) -> tuple[ServeBench, StringIO]:
    said = StringIO()
    console = Console(file=said, width=200)
    return ServeBench(model="m", prompts=PROMPTS, workload=work, console=console, clock=VirtualClock()), said


def peer(**settings: object) -> SlowServer:
    return SlowServer(name="vllm", extra={}, outcome=None, **settings)  # type: ignore[arg-type]


@virtual_time
async def test_both_get_the_same_requests_and_the_ratio_follows() -> None:
    ours, theirs = SlowServer(first_s=0.5, gap_s=0.1), peer(first_s=1.0, gap_s=0.2)
    bench, _ = bench_of()
    await bench.run(ours, [theirs])
    report = Report("serve")
    bench.write(report)
    assert ours.asked == theirs.asked
    assert ours.asked[:3] == [WARM_UP, PROMPTS[0], PROMPTS[1]]
    gaps = [[b - a for a, b in zip(s.sent[3:9], s.sent[4:9], strict=False)] for s in (ours, theirs)]
    assert gaps[0] == pytest.approx(gaps[1])
    assert (ours.starts, theirs.starts) == (3, 3)
    for name in ("ttft_s/1rps/vllm", "tpot_s/1rps/vllm", "e2e_s/b1/vllm", "decode_tokens_per_s/b1/vllm"):
        assert report.ratios[name] == pytest.approx(2.0), name
    assert report.ratios["output_tokens_per_s/1rps/vllm"] >= 1.0
    counted = {(r.system, r.metric): r.n for r in report.rows if r.case == "1rps"}
    assert {r.system for r in report.rows if r.metric == "others_cores"} == {"covey", "vllm"}
    assert counted["covey", "ttft_s"] == counted["vllm", "ttft_s"] == 18


@virtual_time
async def test_systems_never_run_at_the_same_time() -> None:
    ours, theirs = SlowServer(), peer()
    bench, _ = bench_of()
    together: list[int] = []
    for server in (ours, theirs):
        answer = server._answer

        async def watched(request: object, answer: object = answer) -> object:
            together.append(ours.running + theirs.running)
            return await answer(request)  # type: ignore[operator]

        server._answer = watched  # type: ignore[method-assign, assignment]
    await bench.run(ours, [theirs])
    assert set(together) == {1}


@pytest.mark.parametrize("settings", [{"fails_from_start": 1}, {"fails_from_start": 2}, {"status": 500}])
def test_a_peer_that_fails_is_left_out_with_its_reason(settings: dict[str, int]) -> None:
    @virtual_time
    async def run() -> None:
        bench, said = bench_of()
        await bench.run(SlowServer(), [peer(**settings)])
        report = Report("serve")
        bench.write(report)
        assert "vllm is left out: " in said.getvalue()
        assert {row.system for row in report.rows} == {OURS}
        assert report.ratios == {}

    run()


async def test_a_peer_that_was_not_set_up_is_left_out_with_its_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("benchmarks.serve.read_state", lambda _: PeerState(ok=False, reason="no wheel for this CPU"))
    bench, said = bench_of()
    plan = MeshPlan(files=MeshFiles(run_dir=tmp_path, cache_dir=tmp_path), models={"m": "smollm2"})
    assert await best_vllm(bench, plan, SOURCE, quick=True) is None
    assert said.getvalue() == "vllm is left out: no wheel for this CPU\n"


@virtual_time
async def test_a_cached_answer_of_ours_ends_the_run() -> None:
    bench, _ = bench_of()
    with pytest.raises(CoveyError, match="not computed"):
        await bench.run(SlowServer(outcome="hit"), [])


@virtual_time
async def test_the_fastest_setting_is_chosen_and_a_broken_one_is_told() -> None:
    bench, said = bench_of()
    eager, compiled, broken = peer(gap_s=0.2), peer(gap_s=0.1), peer(fails_from_start=1)
    assert await bench.fastest([eager, compiled, broken]) is compiled
    assert await bench.fastest([compiled, eager]) is compiled
    assert "does not work: no such luck" in said.getvalue()
    with pytest.raises(CoveyError, match="no such luck"):
        await bench.fastest([broken])


@virtual_time
async def test_the_limit_is_a_share_of_the_roofline() -> None:
    bench, _ = bench_of(QUICK)
    await bench.run(SlowServer(gap_s=0.1), [])
    report = Report("serve")
    bench.write(report)
    limits = Limits(read_bytes_per_s=25e9, operations_per_s={"fp32": 100e9})
    add_limit(report, limits, CONFIG)
    assert report.ratios == {"decode_tokens_per_s/b1/limit": pytest.approx(10.0 / limits.decode_tokens_per_s(CONFIG))}
    assert report.value(case="machine", system="limit", metric="read_gb_per_s") == 25.0


@virtual_time
async def test_the_plot_is_drawn(tmp_path: Path) -> None:
    bench, _ = bench_of()
    await bench.run(SlowServer(), [peer()])
    bench.plot(tmp_path / "plots" / "serve.png")
    assert (tmp_path / "plots" / "serve.png").read_bytes().startswith(b"\x89PNG")


def test_the_workload_fits_the_flags() -> None:
    assert workload(quick=True, peers=True) == workload(quick=True, peers=False) == QUICK
    assert workload(quick=False, peers=False) == FULL
    assert workload(quick=False, peers=True) == AGAINST_PEERS
