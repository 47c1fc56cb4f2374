"""Shorthand for driving a runner in tests."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from covey.model.plan import Row, Runner, SampleSpec, StepPlan

GREEDY = SampleSpec()


def row(seq: int, tokens: list[int], start: int, blocks: list[int], sample: SampleSpec | None = GREEDY) -> Row:
    return Row(seq=seq, tokens=tuple(tokens), start=start, blocks=tuple(blocks), sample=sample)


def generate(
    runner: Runner, prompt: list[int], count: int, blocks: list[int], *, chunk: int | None = None
) -> list[int]:
    """Prefill in chunks, then decode `count` greedy tokens alone."""
    size = chunk or len(prompt)
    tokens: list[int] = []
    for start in range(0, len(prompt), size):
        piece = prompt[start : start + size]
        last = start + size >= len(prompt)
        outcome = runner.step(StepPlan(rows=(row(0, piece, start, blocks, GREEDY if last else None),)))
        tokens += [s.draws[0].token for s in outcome.sampled]
    while len(tokens) < count:
        at = len(prompt) + len(tokens) - 1
        outcome = runner.step(StepPlan(rows=(row(0, tokens[-1:], at, blocks),)))
        tokens.append(outcome.sampled[0].draws[0].token)
    return tokens


def log_probabilities(runner: Runner, rows: list[Row]) -> dict[int, NDArray[np.float64]]:
    """All log probabilities of each row's next token, by sequence."""
    size = runner.info.vocab_size
    full = SampleSpec(logprobs=size)
    asked = tuple(Row(seq=r.seq, tokens=r.tokens, start=r.start, blocks=r.blocks, sample=full) for r in rows)
    outcome = runner.step(StepPlan(rows=asked))
    assert not outcome.failed
    found = {}
    for sampled in outcome.sampled:
        values = np.empty(size)
        for token, value in sampled.draws[0].top:
            values[token] = value
        found[sampled.seq] = values
    return found
