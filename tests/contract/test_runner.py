"""The contract of `covey.model.plan.Runner`, for every runner: drafts, masks, layer ranges, interrupts."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from covey.engine.fake import FakeRunner
from covey.errors import InvalidArgument
from covey.model.plan import Draw, Row, Runner, SampleSpec, StepPlan
from covey.model.runner import open_runner
from tests.support.tiny_llama import write_tiny_llama

LAYERS = 4
PROMPT = tuple((7 * i * i + 3 * i) % 250 + 1 for i in range(45))
TABLES = tuple(tuple(range(i * 8, i * 8 + 8)) for i in range(8))
SPECS = {
    "greedy": SampleSpec(),
    "seeded": SampleSpec(temperature=0.9, seed=11),
    "penalty": SampleSpec(presence_penalty=1.5, repetition_penalty=1.3, logprobs=2),
}


@dataclass
class Stop:
    """An interrupt that preempts or cancels from its n-th look on."""

    looks: int
    seqs: tuple[int, ...] = ()
    seen: int = field(default=0)

    def cancelled(self) -> Collection[int]:
        self.seen += 1
        return self.seqs if self.seen >= self.looks else ()

    def is_preempted(self) -> bool:
        return not self.seqs and self.seen >= self.looks


class Allowed:
    """A mask of a few tokens."""

    def __init__(self, tokens: Collection[int], vocab_size: int) -> None:
        self._words = np.zeros(-(-vocab_size // 32), np.uint32)
        for token in tokens:
            self._words[token // 32] |= np.uint32(1 << token % 32)

    def words(self) -> NDArray[np.int32]:
        return self._words.view(np.int32)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("tiny") / "model", n_layers=LAYERS)


@pytest.fixture(params=["fake", "torch"])
def runner(request: pytest.FixtureRequest, folder: Path) -> Iterator[Runner]:
    if request.param == "fake":
        made: Runner = FakeRunner(layers=LAYERS)
    else:
        made = open_runner(str(folder), cache_dir=folder.parent / "cache", n_blocks=64, block_size=8)
    yield made
    made.close()


def row(seq: int, tokens: tuple[int, ...], start: int, spec: SampleSpec | None = None, **fields: Any) -> Row:
    return Row(seq=seq, tokens=tokens, start=start, blocks=TABLES[seq], sample=spec, **fields)


def spec_at(spec: SampleSpec, tokens: tuple[int, ...]) -> SampleSpec:
    history = tokens if spec.has_penalty else ()
    return replace(spec, position=len(tokens), history=history, prompt_len=len(PROMPT))


def prefill(runner: Runner, seq: int, tokens: tuple[int, ...] = PROMPT) -> None:
    """Everything but the last token, so that what follows is a decode step."""
    assert not runner.step(StepPlan(rows=(row(seq, tokens[:-1], 0),))).failed


def plain(runner: Runner, seq: int, spec: SampleSpec, count: int) -> list[Draw]:
    """`count` draws after the prompt, a step each."""
    prefill(runner, seq)
    tokens = PROMPT
    draws: list[Draw] = []
    for _ in range(count):
        asked = row(seq, tokens[-1:], len(tokens) - 1, spec_at(spec, tokens))
        (sampled,) = runner.step(StepPlan(rows=(asked,))).sampled
        draws += sampled.draws
        tokens = (*tokens, sampled.draws[0].token)
    return draws


def same(found: tuple[Draw, ...], expected: list[Draw]) -> None:
    """The same tokens, and log probabilities up to rounding."""
    assert [draw.token for draw in found] == [draw.token for draw in expected]
    for one, other in zip(found, expected, strict=True):
        assert (one.logprob is None) == (other.logprob is None)
        if one.logprob is not None and other.logprob is not None:
            assert one.logprob == pytest.approx(other.logprob, abs=1e-3)
            assert [token for token, _ in one.top] == [token for token, _ in other.top]


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("right", [0, 1, 3, 4])
def test_draws_of_a_draft_are_those_of_plain_steps(runner: Runner, name: str, right: int) -> None:
    spec = SPECS[name]
    expected = plain(runner, 0, spec, 8)
    tokens = [draw.token for draw in expected]
    guesses = [*tokens[:right], *((token + 1) % 250 for token in tokens[right:4])]
    prefill(runner, 1)
    asked = row(1, (PROMPT[-1], *guesses), len(PROMPT) - 1, spec_at(spec, PROMPT), draft=4)
    outcome = runner.step(StepPlan(rows=(asked,)))
    (sampled,) = outcome.sampled
    same(sampled.draws, expected[: right + 1])
    so_far = (*PROMPT, *tokens[: right + 1])  # the wrong guesses left nothing that the next steps see
    while len(so_far) < len(PROMPT) + 8:
        asked = row(1, so_far[-1:], len(so_far) - 1, spec_at(spec, so_far))
        (sampled,) = runner.step(StepPlan(rows=(asked,))).sampled
        same(sampled.draws, expected[len(so_far) - len(PROMPT) :][:1])
        so_far = (*so_far, sampled.draws[0].token)


def test_drafts_prefills_and_plain_rows_share_a_step(runner: Runner) -> None:
    expected = plain(runner, 0, SPECS["greedy"], 6)
    tokens = tuple(draw.token for draw in expected)
    prefill(runner, 1)
    prefill(runner, 2)
    spec = spec_at(SPECS["greedy"], PROMPT)
    rows = (
        row(3, PROMPT[:20], 0),
        row(1, (PROMPT[-1], *tokens[:3]), len(PROMPT) - 1, spec, draft=3),
        row(2, PROMPT[-1:], len(PROMPT) - 1, spec),
        row(4, PROMPT, 0, spec),
    )
    outcome = runner.step(StepPlan(rows=rows))
    assert {s.seq: tuple(draw.token for draw in s.draws) for s in outcome.sampled} == {
        1: tokens[:4],
        2: tokens[:1],
        4: tokens[:1],
    }
    assert not outcome.failed
    assert not outcome.suspended


@pytest.mark.parametrize("name", SPECS)
def test_only_what_the_mask_allows_is_drawn(runner: Runner, name: str) -> None:
    free = plain(runner, 0, SPECS[name], 1)[0].token
    allowed = {(free + 7 * i) % 250 for i in range(1, 5)}
    mask = Allowed(allowed, runner.info.vocab_size)
    for seq, mine in ((1, allowed), (2, {free})):
        prefill(runner, seq)
        masked = replace(
            spec_at(SPECS[name], PROMPT), mask=mask if seq == 1 else Allowed({free}, runner.info.vocab_size)
        )
        (sampled,) = runner.step(StepPlan(rows=(row(seq, PROMPT[-1:], len(PROMPT) - 1, masked),))).sampled
        assert sampled.draws[0].token in mine


@pytest.mark.parametrize("cuts", [(1,), (2,), (1, 2, 3)])
def test_layer_ranges_add_up_to_a_step(runner: Runner, cuts: tuple[int, ...]) -> None:
    """A prompt goes through the layers in groups, beside decoding rows that go through all of them each time."""
    expected = [draw.token for draw in plain(runner, 0, SPECS["greedy"], 4)]
    prefill(runner, 1)
    tokens = PROMPT
    for first, last in zip((0, *cuts), (*cuts, None), strict=True):
        spec = spec_at(SPECS["greedy"], PROMPT) if last is None else None
        rows = (
            row(2, PROMPT, 0, spec, first_layer=first, last_layer=last),
            row(1, tokens[-1:], len(tokens) - 1, spec_at(SPECS["greedy"], tokens)),
        )
        outcome = runner.step(StepPlan(rows=rows))
        assert not outcome.failed
        assert outcome.suspended == (() if last is None else ((2, last),))
        drawn = {sampled.seq: sampled.draws[0].token for sampled in outcome.sampled}
        assert drawn[1] == expected[len(tokens) - len(PROMPT)]
        tokens = (*tokens, drawn[1])
    assert drawn[2] == expected[0]


@pytest.mark.parametrize("looks", [1, 2, 3])
def test_preempted_rows_stop_between_layers_and_go_on(runner: Runner, looks: int) -> None:
    expected = [draw.token for draw in plain(runner, 0, SPECS["greedy"], 2)]
    prefill(runner, 1)
    spec = spec_at(SPECS["greedy"], PROMPT)
    rows = (row(2, PROMPT, 0, spec), row(1, PROMPT[-1:], len(PROMPT) - 1, spec))
    outcome = runner.step(StepPlan(rows=rows), Stop(looks))
    assert [sampled.draws[0].token for sampled in outcome.sampled] == expected[:1], "rows of one token went on"
    ((seq, layer),) = outcome.suspended
    assert (seq, 0 < layer < LAYERS) == (2, True)
    outcome = runner.step(StepPlan(rows=(row(2, PROMPT, 0, spec, first_layer=layer),)))
    assert [sampled.draws[0].token for sampled in outcome.sampled] == expected[:1]


def test_a_cancelled_row_is_in_no_result_and_disturbs_nobody(runner: Runner) -> None:
    expected = [draw.token for draw in plain(runner, 0, SPECS["greedy"], 1)]
    spec = spec_at(SPECS["greedy"], PROMPT)
    rows = (row(1, PROMPT, 0, spec), row(2, PROMPT, 0, spec), row(3, PROMPT[:9], 0))
    outcome = runner.step(StepPlan(rows=rows), Stop(2, seqs=(2, 3)))
    assert [(sampled.seq, sampled.draws[0].token) for sampled in outcome.sampled] == [(1, expected[0])]
    assert not outcome.failed
    assert not outcome.suspended
    runner.drop(2)
    outcome = runner.step(StepPlan(rows=(row(2, PROMPT, 0, spec),)))
    assert [sampled.draws[0].token for sampled in outcome.sampled] == expected


def test_a_suspended_row_may_begin_again_and_a_dropped_one_must(runner: Runner) -> None:
    expected = [draw.token for draw in plain(runner, 0, SPECS["greedy"], 1)]
    spec = spec_at(SPECS["greedy"], PROMPT)
    for is_dropped in (False, True):
        assert runner.step(StepPlan(rows=(row(1, PROMPT, 0, last_layer=2),))).suspended == ((1, 2),)
        if is_dropped:
            runner.drop(1)
            runner.drop(1)
            ((seq, _),) = runner.step(StepPlan(rows=(row(1, PROMPT, 0, spec, first_layer=2),))).failed
            assert seq == 1
        outcome = runner.step(StepPlan(rows=(row(1, PROMPT, 0, spec),)))
        assert [sampled.draws[0].token for sampled in outcome.sampled] == expected


def test_other_tokens_do_not_go_on_from_what_was_left(runner: Runner) -> None:
    runner.step(StepPlan(rows=(row(1, PROMPT, 0, last_layer=2),)))
    ((seq, _),) = runner.step(StepPlan(rows=(row(1, PROMPT[:-1], 0, first_layer=2),))).failed
    assert seq == 1


@pytest.mark.parametrize("rows", [
    (row(1, PROMPT, 0), row(1, PROMPT, 0)),
    (row(1, PROMPT, 0, last_layer=2), row(2, PROMPT, 0, last_layer=3)),
])  # fmt: skip
def test_rows_that_contradict_each_other_are_refused(runner: Runner, rows: tuple[Row, ...]) -> None:
    with pytest.raises(InvalidArgument):
        runner.step(StepPlan(rows=rows))
