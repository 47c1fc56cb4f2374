"""From the hidden states of a step to its draws: logits only where a token is drawn, drafts verified in order."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import replace

import torch

from .batch import Batch
from .plan import Draw, Row, Sampled, SampleSpec
from .sampler import draw

Head = Callable[[torch.Tensor], torch.Tensor]
"""Logits [row, vocab] of hidden states [row, hidden]."""


def sample(
    batch: Batch | None, hidden: torch.Tensor, broken: Collection[int], head: Head
) -> tuple[list[Sampled], list[tuple[int, str]]]:
    """Draw for each row that asks for it; `broken` sequences and those with a logit that is no number fail alone."""
    if batch is None:
        return [], []
    failed = [(row.seq, "the model's hidden states are not finite") for row in batch.rows if row.seq in broken]
    asking = [
        (row, int(batch.first[i + 1]) - 1 - row.draft)
        for i, row in enumerate(batch.rows)
        if row.sample is not None and row.seq not in broken
    ]
    if not asking:
        return [], failed
    places = [place + i for row, place in asking for i in range(row.draft + 1)]
    logits = head(hidden[torch.tensor(places)])
    best, greedy = logits.max(dim=1)
    fine = torch.isfinite(best).tolist()  # NaN wins every comparison
    chosen = greedy.tolist()
    sampled = []
    at = 0
    for row, _ in asking:
        mine = range(at, at + row.draft + 1)
        at = mine.stop
        if all(fine[i] for i in mine):
            sampled.append(Sampled(seq=row.seq, draws=tuple(_draws(row, logits, mine, chosen))))
        else:
            failed.append((row.seq, "the model's logits are not finite"))
    return sampled, failed


def _draws(row: Row, logits: torch.Tensor, places: range, greedy: list[int]) -> list[Draw]:
    """Draw after the token before the draft and on while each guess equals what was drawn."""
    guesses = row.tokens[len(row.tokens) - row.draft :]
    spec = row.sample
    assert spec is not None
    draws: list[Draw] = []
    for i, place in enumerate(places):
        drawn = Draw(token=greedy[place]) if spec.is_plain_greedy else draw(logits[place].numpy(), spec)
        draws.append(drawn)
        if i < row.draft and drawn.token != guesses[i]:
            break
        spec = _after(spec, drawn.token)
    return draws


def _after(spec: SampleSpec, token: int) -> SampleSpec:
    """How the next token is drawn once `token` was."""
    history = (*spec.history, token) if spec.history else ()
    return replace(spec, position=spec.position + 1, history=history)
