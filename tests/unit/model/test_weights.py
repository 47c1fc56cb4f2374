"""The weight cache is made once, survives a race and a crash, and is shared between processes."""

from __future__ import annotations

import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from covey.errors import InvalidArgument
from covey.model.source import resolve
from covey.model.weights import map_weights, prepare, separate

RACE = """
import sys
from pathlib import Path
from covey.model.source import resolve
from covey.model.weights import map_weights, prepare
source = resolve(sys.argv[1]); config = source.config()
print("ready", flush=True); sys.stdin.readline()
made = prepare(source, config, Path(sys.argv[2]))
print(made.converted, float(map_weights(made.path, config).embed.sum()), flush=True)
"""

MEASURE = """
import sys
from pathlib import Path
import torch
torch.set_num_threads(1)
torch.mm(torch.ones(8, 8), torch.ones(8, 8))
def dirty():
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return sum(int(l.split()[1]) for l in lines if l.startswith("Private_Dirty")) / 1024
before = dirty()
from covey.model.runner import open_runner
from covey.model.plan import Row, SampleSpec, StepPlan
runner = open_runner("smollm2", cache_dir=Path(sys.argv[1]), n_blocks=1000)
opened = dirty()
for start in range(3):
    runner.step(StepPlan(rows=(Row(seq=0, tokens=(start + 5,), start=start, blocks=(0,), sample=SampleSpec()),)))
print(opened - before, dirty() - before)
"""


def test_the_cache_is_private_and_made_once(tiny_folder: Path, tmp_path: Path) -> None:
    source = resolve(str(tiny_folder))
    config = source.config()
    cache = tmp_path / "new" / "cache"
    made = prepare(source, config, cache)
    assert made.converted
    assert stat.S_IMODE(made.path.stat().st_mode) == 0o600
    assert stat.S_IMODE(cache.stat().st_mode) == 0o700
    assert not prepare(source, config, cache).converted
    assert {p.suffix for p in cache.iterdir()} == {".weights", ".lock"}


def test_two_processes_at_once_convert_once(tiny_folder: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-c", RACE, str(tiny_folder), str(tmp_path)]
    children = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    for child in children:
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
    answers = [child.communicate("go\n", timeout=60)[0].split() for child in children]
    assert sorted(a[0] for a in answers) == ["False", "True"]
    assert answers[0][1] == answers[1][1]


def test_a_truncated_or_foreign_cache_is_refused(tiny_folder: Path, tmp_path: Path) -> None:
    source = resolve(str(tiny_folder))
    config = source.config()
    path = prepare(source, config, tmp_path).path
    content = path.read_bytes()
    path.write_bytes(content[:-100])
    with pytest.raises(InvalidArgument, match="cut short"):
        map_weights(path, config)
    path.write_bytes(b"x" * len(content))
    with pytest.raises(InvalidArgument, match="not a weight cache"):
        map_weights(path, config)
    path.write_bytes(b"")
    with pytest.raises(InvalidArgument, match="not a weight cache"):
        map_weights(path, config)


def test_a_failed_conversion_leaves_nothing(tiny_folder: Path, tmp_path: Path) -> None:
    import dataclasses

    source = resolve(str(tiny_folder))
    wrong = dataclasses.replace(source.config(), intermediate=100)
    with pytest.raises(InvalidArgument, match=r"0\.gate_up has shape"):
        prepare(source, wrong, tmp_path)
    assert [p.suffix for p in tmp_path.iterdir()] == [".lock"]


def test_fused_rows_are_the_checkpoints(tiny_folder: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    source = resolve(str(tiny_folder))
    config = source.config()
    layer = map_weights(prepare(source, config, tmp_path).path, config).layers[1]
    raw = load_file(tiny_folder / "model.safetensors")
    gate, up = separate(layer.gate_up.rows(), config.intermediate, dim=0)
    assert torch.equal(gate, raw["model.layers.1.mlp.gate_proj.weight"])
    assert torch.equal(up, raw["model.layers.1.mlp.up_proj.weight"])
    qkv = layer.qkv.rows()
    assert torch.equal(qkv[96:], raw["model.layers.1.self_attn.v_proj.weight"])
    q = raw["model.layers.1.self_attn.q_proj.weight"]
    assert torch.equal(qkv[0], q[0])
    assert torch.equal(qkv[1], q[8]), "rotary pairs stand side by side"


def test_private_growth_stays_under_50_mib(smollm2: object, packaged_cache: Path) -> None:
    """Weights (538 MiB) are mapped, not copied: what a process dirties beyond importing torch stays small."""
    out = subprocess.run(
        [sys.executable, "-c", MEASURE, str(packaged_cache)], capture_output=True, text=True, check=True, timeout=100
    ).stdout.split()
    opened, stepped = map(float, out)
    assert opened < 50.0
    assert stepped < 50.0 + 3.0
