"""The GPU runner with its kernels in the interpreter: greedy like the CPU's and like transformers, in any batch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from covey.errors import InvalidArgument
from covey.model.gpu.graphs import DecodeGraphs, _Captured, bucket_of
from covey.model.gpu.kernels.decode_attention import SPLIT_TOKENS
from covey.model.gpu.runner import GpuRunner
from covey.model.plan import Row, Runner, SampleSpec, StepPlan
from covey.model.pool import KvDtype
from covey.model.runner import TorchRunner, open_runner
from tests.support import families
from tests.support.families import write_reference
from tests.support.tiny_llama import VOCAB_SIZE, write_tiny_llama
from tests.unit.model.driving import GREEDY, generate, log_probabilities, row

from .opened import open_tiny

PROMPT = [(7 * i * i + 3 * i) % 256 for i in range(61)]
FAMILIES = ("llama", "llama-tied", "mistral", "qwen2", "qwen3")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("gpu") / "tiny")


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def tiny(folder: Path, cache: Path) -> Iterator[Runner]:
    runner = open_tiny(folder, cache)
    yield runner
    runner.close()


def on_cpu(folder: Path, cache: Path, kv_dtype: KvDtype = "fp32") -> TorchRunner:
    return open_runner(str(folder), cache_dir=cache, n_blocks=64, block_size=8, kv_dtype=kv_dtype, kernels="torch")


@pytest.mark.golden
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_transformers(family: str, tmp_path: Path) -> None:
    model = write_reference(families.FAMILIES[family], tmp_path / family)
    tokens = torch.randint(0, VOCAB_SIZE, (45,), generator=torch.Generator().manual_seed(1)).tolist()
    with torch.inference_mode():
        expected = torch.log_softmax(model(torch.tensor([tokens])).logits[0].double(), dim=-1).numpy()
    runner = open_tiny(tmp_path / family, tmp_path / "cache", n_blocks=20)
    table = [3, 17, 0, 5, 11, 2]
    for start, end in [(0, 30), (30, 31), (31, 42), (42, 43), (43, 44), (44, 45)]:
        found = log_probabilities(runner, [row(1, tokens[start:end], start, table)])[1]
        np.testing.assert_allclose(found, expected[end - 1], atol=2e-4, rtol=0)


@pytest.mark.parametrize("chunk", [17, 60, 61])
def test_tokens_equal_the_cpu_runner(tiny: Runner, folder: Path, cache: Path, chunk: int) -> None:
    expected = generate(on_cpu(folder, cache), PROMPT, 10, list(range(20)))
    assert generate(tiny, PROMPT, 10, list(range(30, 50)), chunk=chunk) == expected
    assert len(set(expected)) > 3, "the tiny model must not be stuck on one token, else this shows nothing"


def test_a_row_does_not_depend_on_its_neighbours(tiny: Runner) -> None:
    """Decode rows of different contexts, a first chunk and a later one run in one step and each as if alone."""
    lengths = [1, 8, 60]
    tables = [list(range(i * 8, i * 8 + 8)) for i in range(5)]
    for i, length in enumerate(lengths):
        tiny.step(StepPlan(rows=(row(i, PROMPT[:length], 0, tables[i], None),)))
    tiny.step(StepPlan(rows=(row(4, PROMPT[:20], 0, tables[4], None),)))
    rows = [row(i, [PROMPT[length]], length, tables[i]) for i, length in enumerate(lengths)]
    rows += [row(3, PROMPT[:33], 0, tables[3]), row(4, PROMPT[20:45], 20, tables[4])]
    alone = {r.seq: log_probabilities(tiny, [r])[r.seq] for r in rows}
    together = log_probabilities(tiny, rows[::-1])
    for seq, values in alone.items():
        np.testing.assert_allclose(together[seq], values, atol=2e-4, rtol=0)


@pytest.mark.parametrize("kv_dtype", ["fp32", "fp16", "int8"])
def test_blocks_of_a_cpu_runner_go_on_here_and_back(folder: Path, cache: Path, kv_dtype: KvDtype) -> None:
    """What prefill on one kind of machine hands to decode on the other: the bytes of the blocks, under other ids."""
    cpu = on_cpu(folder, cache, kv_dtype)
    gpu = open_tiny(folder, cache, kv_dtype=kv_dtype)
    assert gpu.info.block_bytes == cpu.info.block_bytes
    expected = generate(cpu, PROMPT, 6, list(range(12)))
    fresh = on_cpu(folder, cache, kv_dtype)
    fresh.step(StepPlan(rows=(row(0, PROMPT, 0, list(range(8)), None),)))
    table = [31, 2, 17, 9, 30, 4, 11, 23, 1]
    _copy(fresh, range(8), gpu, table)
    tokens = _continue(gpu, expected[:1], 3, table)
    _copy(gpu, table, fresh, range(20, 29))
    assert _continue(fresh, tokens, 6, list(range(20, 29))) == expected


def _copy(source: Runner, blocks: Any, target: Runner, into: Any) -> None:
    for block, other in zip(blocks, into, strict=False):
        with source.block_view(block) as read, target.block_view(other) as write:
            write[:] = read


def _continue(runner: Runner, tokens: list[int], count: int, table: list[int]) -> list[int]:
    tokens = list(tokens)
    while len(tokens) < count:
        outcome = runner.step(StepPlan(rows=(row(0, tokens[-1:], len(PROMPT) + len(tokens) - 1, table),)))
        tokens.append(outcome.sampled[0].draws[0].token)
    return tokens


@pytest.mark.parametrize("kv_dtype", ["fp16", "int8"])
def test_smaller_pages_hold_what_they_hold_on_a_cpu(folder: Path, cache: Path, kv_dtype: KvDtype) -> None:
    """Log probabilities in a prefill and in the decode step after it; a rounding apart may flip a last bit of int8."""
    cpu, gpu = on_cpu(folder, cache, kv_dtype), open_tiny(folder, cache, kv_dtype=kv_dtype)
    for tokens, start in ((PROMPT[:40], 0), (PROMPT[40:41], 40)):
        asked = [row(1, tokens, start, list(range(8)))]
        expected, found = log_probabilities(cpu, asked)[1], log_probabilities(gpu, asked)[1]
        np.testing.assert_allclose(found, expected, atol=0.02, rtol=0)


def test_bf16_products_stay_close(tiny: Runner, folder: Path, cache: Path) -> None:
    """The model's weights are three times the usual size, so that its logits tell every difference: they span 30."""
    lower = open_tiny(folder, cache, precision="bf16", kv_dtype="fp16")
    for tokens, start in ((PROMPT[:40], 0), (PROMPT[40:41], 40)):
        asked = [row(1, tokens, start, list(range(8)))]
        expected, found = log_probabilities(tiny, asked)[1], log_probabilities(lower, asked)[1]
        assert np.ptp(expected) > 15
        assert 0.0 < np.abs(expected - found).mean() < 0.5


def test_unused_slots_of_a_block_are_zero(tiny: Runner) -> None:
    """A recycled block that travels unfinished carries nothing of its last owner."""
    info = tiny.info
    with tiny.block_view(5) as view:
        view[:] = b"\x7f" * info.block_bytes
    tiny.step(StepPlan(rows=(row(0, PROMPT[:13], 0, [4, 5]),)))
    block = np.frombuffer(tiny.block_view(5), dtype=np.float32).reshape(info.n_layers, 2, 2, -1)
    keys, values = block[:, 0].reshape(-1, 16, 8), block[:, 1].reshape(-1, 8, 16)
    assert np.all(keys[:, :, 5:] == 0.0)
    assert np.all(values[:, 5:] == 0.0)
    assert np.all(keys[:, :, :5] != 0.0)


def test_a_row_of_nan_fails_alone_and_leaves_nothing_behind(tiny: Runner) -> None:
    tables = [[seq * 4 + i for i in range(4)] for seq in range(3)]
    for seq in range(3):
        tiny.step(StepPlan(rows=(row(seq, PROMPT[:20], 0, tables[seq], None),)))
    rows = tuple(row(seq, [PROMPT[20]], 20, tables[seq]) for seq in range(3))
    expected = tiny.step(StepPlan(rows=rows))
    with tiny.block_view(5) as view:  # a block of sequence 1
        np.frombuffer(view, dtype=np.float32)[:] = np.nan
    outcome = tiny.step(StepPlan(rows=rows))
    assert [(seq, "not finite" in why) for seq, why in outcome.failed] == [(1, True)]
    assert outcome.sampled == tuple(s for s in expected.sampled if s.seq != 1)
    chunk = (row(1, PROMPT[20:23], 20, tables[1], None), row(0, PROMPT[20:23], 20, tables[0], None))
    assert [seq for seq, _ in tiny.step(StepPlan(rows=chunk)).failed] == [1], "it fails even where nothing is drawn"
    assert tiny.step(StepPlan(rows=(row(9, PROMPT[:20], 0, [5, 6, 7]),))).failed == ()


@pytest.mark.parametrize(
    ("bad", "why"),
    [
        (row(1, [], 0, [1]), "at least one token"),
        (row(1, [3], -1, [1]), "start"),
        (row(1, [3] * 9, 0, [1]), "covers 8 positions, 9"),
        (row(1, [3], 0, [64]), "outside the pool"),
        (row(1, [3], 0, [-1]), "outside the pool"),
        (row(1, [259], 0, [1]), "vocabulary"),
        (row(1, [3], 2048, [1] * 300), "context limit"),
        (replace(row(1, [3], 0, [1]), draft=1), "draft of 1"),
        (replace(row(1, [3, 4], 0, [1], None), draft=1), "only a row that draws"),
        (replace(row(1, [3], 0, [1]), first_layer=2), "not a range"),
    ],
)
def test_an_impossible_row_fails_alone(tiny: Runner, bad: Row, why: str) -> None:
    outcome = tiny.step(StepPlan(rows=(bad, row(2, PROMPT[:4], 0, [9]))))
    assert outcome.failed[0][0] == 1
    assert why in outcome.failed[0][1]
    assert [s.seq for s in outcome.sampled] == [2]


def test_a_step_may_sample_nothing_or_be_empty_and_a_closed_runner_says_so(tiny: Runner) -> None:
    assert tiny.step(StepPlan(rows=(row(1, PROMPT[:9], 0, [0, 1], None),))).sampled == ()
    assert tiny.step(StepPlan(rows=())).sampled == ()
    tiny.close()
    with pytest.raises(InvalidArgument, match="closed"):
        tiny.step(StepPlan(rows=()))
    with pytest.raises(InvalidArgument, match="closed"):
        tiny.block_view(0)


class Replayed:
    """Stands in for a CUDA graph on a CPU: a replay computes the padded bucket afresh into the same logits."""

    def __init__(self, graphs: DecodeGraphs, rows: int, n_splits: int) -> None:
        self._graphs = graphs
        self._bucket = (rows, n_splits)
        self.logits = torch.zeros(rows, VOCAB_SIZE, device=graphs._static.padded(1, 1).tokens.device)

    def replay(self) -> None:
        self.logits.copy_(self._graphs._decoder.decode(self._graphs._static.padded(*self._bucket)))


def test_decode_steps_by_bucket_are_those_without(tiny: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of the graph path but capture and replay, which need a GPU: buckets, padding, reuse, rows left out."""

    def capture(self: DecodeGraphs, rows: int, n_splits: int) -> _Captured:
        replayed = Replayed(self, rows, n_splits)
        return _Captured(graph=replayed, logits=replayed.logits)

    monkeypatch.setattr(DecodeGraphs, "_capture", capture)
    assert isinstance(tiny, GpuRunner)
    tables = [[seq * 4 + i for i in range(4)] for seq in range(3)]
    for seq, length in enumerate((3, 20, 8)):
        tiny.step(StepPlan(rows=(row(seq, PROMPT[:length], 0, tables[seq], None),)))
    specs = (GREEDY, SampleSpec(temperature=1.0, seed=3), SampleSpec(logprobs=1))
    rows = tuple(row(i, [PROMPT[n]], n, tables[i], specs[i]) for i, n in enumerate((3, 20, 8)))
    expected = tiny.step(StepPlan(rows=rows))
    assert tiny._parts is not None
    graphs = DecodeGraphs(tiny._parts.decoder, 256, tiny._device)
    tiny._parts = replace(tiny._parts, graphs=graphs)
    for chosen in (rows, rows[1:], rows):
        wanted = {r.seq for r in chosen}
        found = {s.seq: s.draws for s in tiny.step(StepPlan(rows=chosen)).sampled}
        assert {seq: d[0].token for seq, d in found.items()} == {
            s.seq: s.draws[0].token for s in expected.sampled if s.seq in wanted
        }
    assert sorted(graphs._captured) == [(2, 1), (4, 1)]

    class Gone:
        def cancelled(self) -> set[int]:
            return {0}

        def is_preempted(self) -> bool:
            return True

    outcome = tiny.step(StepPlan(rows=rows[:2]), Gone())
    assert [s.seq for s in outcome.sampled] == [1]
    assert outcome.sampled[0].draws == next(s.draws for s in expected.sampled if s.seq == 1)


def test_buckets_are_powers_of_two() -> None:
    assert [bucket_of(n) for n in (0, 1, 2, 3, 4, 5, 200)] == [1, 1, 2, 4, 4, 8, 256]
    assert SPLIT_TOKENS % 32 == 0
