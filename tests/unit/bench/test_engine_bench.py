"""A whole run over scripted drivers: figures of every system, and what fails is left out, our own fp32 runner aside."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from benchmarks.child import ROOT, plain_environment
from benchmarks.contenders import Contender
from benchmarks.engine import EngineBench
from benchmarks.report import Report
from covey.clock import MonotonicClock
from covey.errors import Unavailable
from covey.model.source import resolve

TEXT = list(range(3000))
SCRIPT = """
import sys
sys.path.append(sys.argv[1])
from benchmarks.drivers.lines import private_output, serve
lines, second, broken = private_output(), float(sys.argv[2]), sys.argv[3]
def step(prompts, steps, **_): return [second] * steps
def mixed(prompts, prompt): return {"seconds": [second], "tokens": len(prompt) + len(prompts)}
limits = {"read_bytes_per_s": 25e9, "operations_per_s": {"fp32": 1e11, "bf16": 1e11, "int8": 1e11}}
operations = {
    "prefill": lambda prompt: second, "decode": step, "constrained": step, "mixed": mixed,
    "grid": lambda rows, context, repeats: [second * (1 + rows + rows * context)] * repeats,
    "kv_bytes_per_token": lambda: 46080.0, "limits": lambda: limits,
    "products": lambda precision, rows, sampled: {"fastest": second / 2},
}
operations.pop(broken, None)
serve("1", operations, lines)
"""


def contender(
    name: str, *, precision: str = "fp32", peer: str = "", second: float = 0.1, broken: str = ""
) -> Contender:
    command = (sys.executable, "-S", "-P", "-c", SCRIPT, str(ROOT), str(second), broken)
    return Contender(name=name, precision=precision, peer=peer, command=command, environment=plain_environment())


def run(tmp_path: Path, contenders: Sequence[Contender], rounds: int = 2) -> tuple[Report, str]:
    console = Console(file=StringIO(), width=200)
    bench = EngineBench(resolve("smollm2"), tmp_path, console, MonotonicClock(), steps=4)
    report = Report("engine")
    with bench:
        bench.start([contender("machine", precision=""), *contenders])
        bench.measure(TEXT, rounds)
        points = bench.grid([(1, 128), (4, 128), (4, 512)])
    assert all(len(found) == 3 for found in points.values())
    bench.figures().write(report)
    return report, console.file.getvalue()  # type: ignore[attr-defined]


def test_every_system_is_asked_everything_in_every_round(tmp_path: Path) -> None:
    peers = [contender("vllm-eager", peer="vllm", second=0.3), contender("llamacpp", peer="llamacpp", second=0.05)]
    report, _ = run(tmp_path, [contender("covey"), contender("covey", precision="int8", second=0.02), *peers])
    samples = {(row.system, row.case): row.n for row in report.rows if row.metric.endswith("tokens_per_s_p50")}
    assert samples["covey", "2000-int8"] == samples["vllm-eager", "b32-fp32"] == 2
    assert report.ratios["decode_tokens_per_s/b8-fp32/vllm"] == pytest.approx(3.0)
    assert report.ratios["prefill_tokens_per_s/512-int8/llamacpp"] == pytest.approx(2.5)
    assert report.ratios["decode_tokens_per_s/b1-fp32/products"] == pytest.approx(0.5)


def test_a_peer_that_fails_is_left_out_by_name(tmp_path: Path) -> None:
    gone = Contender(name="gone", precision="fp32", peer="gone", command=("/no/such/program",), environment={})
    report, said = run(tmp_path, [contender("covey"), contender("vllm-eager", peer="vllm", broken="decode"), gone], 1)
    assert "vllm-eager in fp32 is left out: decode failed" in said
    assert "gone-fp32 is left out: cannot start" in said
    assert not [name for name in report.ratios if name.endswith(("/vllm", "/gone"))]
    assert "decode_tokens_per_s/b1-fp32/limit" in report.ratios


def test_a_question_that_only_we_answer_may_fail_alone(tmp_path: Path) -> None:
    report, said = run(tmp_path, [contender("covey", broken="constrained")], 1)
    assert "b8-schema in fp32 is left out" in said
    assert "decode_tokens_per_s/b8-fp32/limit" in report.ratios
    assert "decode_tokens_per_s/b8-schema-fp32/unconstrained" not in report.ratios


def test_our_own_failure_is_the_end_of_the_run(tmp_path: Path) -> None:
    with pytest.raises(Unavailable, match="prefill failed"):
        run(tmp_path, [contender("covey", broken="prefill")], 1)
