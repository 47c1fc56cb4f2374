"""One ragged step: a row's result depends on its own tokens only, and a bad row fails alone."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch

from covey.errors import InvalidArgument
from covey.model.plan import Row, StepPlan
from covey.model.runner import TorchRunner, open_runner
from covey.model.share import CoreShare
from covey.testing import VirtualClock

from .driving import generate, log_probabilities, row

PROMPT = [(7 * i * i + 3 * i) % 256 for i in range(61)]
CLOSE = 2e-4


@pytest.mark.parametrize("chunk", [1, 5, 8, 17, 60])
def test_chunks_equal_one_prefill(tiny: TorchRunner, chunk: int) -> None:
    whole = generate(tiny, PROMPT, 20, list(range(20)))
    assert generate(tiny, PROMPT, 20, list(range(40, 60)), chunk=chunk) == whole
    assert len(set(whole)) > 5, "the tiny model must not be stuck on one token, else this shows nothing"


def test_a_row_does_not_depend_on_its_neighbours(tiny: TorchRunner) -> None:
    """Decode rows of very different contexts, a first chunk and a later chunk run in one step and each as if alone."""
    lengths = [1, 3, 8, 9, 30, 60]
    tables = [list(range(i * 8, i * 8 + 8)) for i in range(8)]
    for i, length in enumerate(lengths):
        tiny.step(StepPlan(rows=(row(i, PROMPT[:length], 0, tables[i], None),)))
    tiny.step(StepPlan(rows=(row(7, PROMPT[:20], 0, tables[7], None),)))
    rows = [row(i, [PROMPT[length]], length, tables[i]) for i, length in enumerate(lengths)]
    rows.append(row(6, PROMPT[:33], 0, tables[6]))
    rows.append(row(7, PROMPT[20:45], 20, tables[7]))
    alone = {r.seq: log_probabilities(tiny, [r])[r.seq] for r in rows}
    together = log_probabilities(tiny, rows[::-1])
    for seq, values in alone.items():
        np.testing.assert_allclose(together[seq], values, atol=CLOSE, rtol=0)


def test_blocks_copied_elsewhere_continue_the_same(tiny: TorchRunner, tiny_folder: Path, weight_cache: Path) -> None:
    """What prefill hands to decode: the bytes of the blocks, the unfinished last one included, under other ids."""
    expected = generate(tiny, PROMPT, 12, list(range(12)))
    tiny.step(StepPlan(rows=(row(0, PROMPT, 0, list(range(12, 24)), None),)))
    taken = [bytes(tiny.block_view(12 + i)) for i in range(8)]
    assert {len(block) for block in taken} == {tiny.info.block_bytes}
    other = open_runner(str(tiny_folder), cache_dir=weight_cache, n_blocks=40, block_size=8)
    assert other.info.layout_fingerprint == tiny.info.layout_fingerprint
    table = [31, 2, 17, 9, 30, 4, 11, 23, 1, 0, 5, 6]
    for block, content in zip(table, taken, strict=False):
        other.block_view(block)[:] = content
    tokens = expected[:1]
    while len(tokens) < 12:
        outcome = other.step(StepPlan(rows=(row(0, tokens[-1:], len(PROMPT) + len(tokens) - 1, table),)))
        tokens.append(outcome.sampled[0].draws[0].token)
    assert tokens == expected


def test_unused_slots_of_a_block_are_zero(tiny: TorchRunner) -> None:
    """A recycled block that travels unfinished carries nothing of its last owner."""
    info = tiny.info
    tiny.block_view(5)[:] = b"\x7f" * info.block_bytes
    tiny.step(StepPlan(rows=(row(0, PROMPT[:13], 0, [4, 5]),)))
    block = np.frombuffer(tiny.block_view(5), dtype=np.float32).reshape(info.n_layers, 2, 2, -1)
    keys = block[:, 0].reshape(info.n_layers, 2, 16, info.block_size).transpose(0, 1, 3, 2)
    values = block[:, 1].reshape(info.n_layers, 2, info.block_size, 16)
    for found in (keys, values):
        assert np.all(found[:, :, 5:] == 0.0)
        assert np.all(np.any(found[:, :, :5] != 0.0, axis=-1))


def test_a_row_of_nan_fails_alone_and_leaves_nothing_behind(tiny: TorchRunner) -> None:
    for seq in (0, 1, 2):
        tiny.step(StepPlan(rows=(row(seq, PROMPT[:20], 0, [seq * 4, seq * 4 + 1, seq * 4 + 2, seq * 4 + 3], None),)))
    rows = [row(seq, [PROMPT[20]], 20, [seq * 4, seq * 4 + 1, seq * 4 + 2, seq * 4 + 3]) for seq in (0, 1, 2)]
    expected = tiny.step(StepPlan(rows=tuple(rows)))
    np.frombuffer(tiny.block_view(5), dtype=np.float32)[:] = np.nan  # a block of sequence 1
    outcome = tiny.step(StepPlan(rows=tuple(rows)))
    assert [(seq, "not finite" in why) for seq, why in outcome.failed] == [(1, True)]
    assert outcome.sampled == tuple(s for s in expected.sampled if s.seq != 1)
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
    ],
)
def test_an_impossible_row_fails_alone(tiny: TorchRunner, bad: Row, why: str) -> None:
    good = row(2, PROMPT[:4], 0, [9])
    outcome = tiny.step(StepPlan(rows=(bad, good)))
    assert outcome.failed[0][0] == 1
    assert why in outcome.failed[0][1]
    assert [s.seq for s in outcome.sampled] == [2]


def test_a_step_may_sample_nothing_or_be_empty(tiny: TorchRunner) -> None:
    assert tiny.step(StepPlan(rows=(row(1, PROMPT, 0, list(range(8)), None),))).sampled == ()
    assert tiny.step(StepPlan(rows=())).sampled == ()


def test_two_rows_of_one_sequence_are_refused(tiny: TorchRunner) -> None:
    with pytest.raises(InvalidArgument, match="two rows"):
        tiny.step(StepPlan(rows=(row(1, [3], 0, [1]), row(1, [4], 1, [1]))))


def test_a_closed_runner_says_so(tiny: TorchRunner) -> None:
    tiny.close()
    with pytest.raises(InvalidArgument, match="closed"):
        tiny.step(StepPlan(rows=()))
    with pytest.raises(InvalidArgument, match="closed"):
        tiny.block_view(0)


def test_a_runner_takes_its_share_of_the_cores(
    tiny_folder: Path, weight_cache: Path, tmp_path: Path, clock: VirtualClock
) -> None:
    before, affinity = torch.get_num_threads(), os.sched_getaffinity(0)
    clock.advance(1.0)
    mine, other = (CoreShare(tmp_path / "engines.share", clock=clock) for _ in range(2))
    runner = open_runner(str(tiny_folder), cache_dir=weight_cache, n_blocks=8, share=mine)
    try:
        alone = generate(runner, PROMPT, 3, [0, 1, 2])
        assert torch.get_num_threads() == len(affinity)
        other.begin(lambda _count: None)
        assert generate(runner, PROMPT, 3, [3, 4, 5]) == alone
        assert torch.get_num_threads() == max(1, len(affinity) // 2)
    finally:
        torch.set_num_threads(before)
        os.sched_setaffinity(0, affinity)
        mine.close()
        other.close()


def test_the_context_limit_can_only_be_lowered(tiny_folder: Path, weight_cache: Path) -> None:
    def limit(asked: int) -> int:
        runner = open_runner(str(tiny_folder), cache_dir=weight_cache, n_blocks=2, context_limit=asked)
        return runner.info.context_limit

    assert (limit(100), limit(10**6)) == (100, 2048)
