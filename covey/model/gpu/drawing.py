"""Draws the tokens of a step: plain settings in the kernel, penalties, biases and log probabilities on the host."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray

from covey.model.plan import Draw, Row, Sampled, SampleSpec
from covey.model.sampler import draw, uniform

from .kernels.sampling import NOT_FINITE, DrawSettings, draw_tokens

_NO_DRAW = "the model's logits are not finite, or nothing may be drawn"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Place:
    """One row of logits: what to draw there, for the row's n-th guess."""

    at: int
    spec: SampleSpec


def draw_rows(
    logits: torch.Tensor, rows: Sequence[Row], broken: Collection[int]
) -> tuple[list[Sampled], list[tuple[int, str]]]:
    """The draws of rows that have a `sample`, and the rows that failed alone: `broken` sequences, and those of which
    no token can be drawn.

    `logits` holds `draft + 1` rows for each, in order.
    """
    firsts = np.cumsum([0, *(row.draft + 1 for row in rows)])
    places = [
        [_Place(at=int(first) + i, spec=_spec_after(row, i)) for i in range(row.draft + 1)]
        for first, row in zip(firsts, rows, strict=False)
    ]
    quick = [place for group in places for place in group if _is_quick(place.spec)]
    tokens = dict(zip((place.at for place in quick), _draw_quick(logits, quick), strict=True))
    sampled, failed = [], [(seq, "the model's hidden states are not finite") for seq in broken]
    for row, group in zip(rows, places, strict=True):
        if row.seq in broken:
            continue
        draws = _accept(row, group, tokens, logits)
        if draws is None:
            failed.append((row.seq, _NO_DRAW))
        else:
            sampled.append(Sampled(seq=row.seq, draws=draws))
    return sampled, failed


def _spec_after(row: Row, guesses: int) -> SampleSpec:
    """The settings of the draw after so many guesses of a row."""
    assert row.sample is not None
    if not guesses:
        return row.sample
    spec, start = row.sample, len(row.tokens) - row.draft
    history = (*spec.history, *row.tokens[start : start + guesses]) if spec.has_penalty else ()
    return replace(spec, position=spec.position + guesses, history=history)


def _is_quick(spec: SampleSpec) -> bool:
    """Whether the kernel can do it."""
    return not spec.has_penalty and not spec.logit_bias and spec.logprobs is None


def _accept(row: Row, places: list[_Place], tokens: dict[int, int], logits: torch.Tensor) -> tuple[Draw, ...] | None:
    """Draw for as long as the guesses hold; None where a draw is impossible."""
    guesses = row.tokens[len(row.tokens) - row.draft :]
    draws: list[Draw] = []
    for place, guess in zip(places, (*guesses, None), strict=True):
        drawn = Draw(token=tokens[place.at]) if place.at in tokens else _draw_on_host(logits[place.at], place.spec)
        if drawn is None or drawn.token == NOT_FINITE:
            return tuple(draws) if draws else None
        draws.append(drawn)
        # A mask belongs to the first token alone: what it would be after a guess nobody has said.
        if drawn.token != guess or place.spec.mask is not None:
            break
    return tuple(draws)


def _draw_on_host(logits: torch.Tensor, spec: SampleSpec) -> Draw | None:
    row = logits.cpu().numpy()
    return draw(row, spec) if np.isfinite(row.max()) else None


def _draw_quick(logits: torch.Tensor, places: Sequence[_Place]) -> list[int]:
    if not places:
        return []
    device, specs = logits.device, [place.spec for place in places]
    masks, mask_rows = _masks(specs, logits.shape[1])

    def column(values: list[float] | list[int], dtype: torch.dtype) -> torch.Tensor:
        return torch.tensor(values, dtype=dtype).to(device, non_blocking=True)

    settings = DrawSettings(
        temperature=column([spec.temperature for spec in specs], torch.float32),
        top_k=column([spec.top_k for spec in specs], torch.int32),
        top_p=column([spec.top_p for spec in specs], torch.float32),
        min_p=column([spec.min_p for spec in specs], torch.float32),
        uniform=column([uniform(s.seed, s.position) if s.temperature > 0 else 0.0 for s in specs], torch.float32),
        mask_row=column(mask_rows, torch.int32),
        masks=torch.from_numpy(masks).to(device, non_blocking=True),
    )
    chosen = logits.index_select(0, column([place.at for place in places], torch.int32))
    tokens: list[int] = draw_tokens(chosen, settings).tolist()
    return tokens


def _masks(specs: Sequence[SampleSpec], vocab: int) -> tuple[NDArray[np.int32], list[int]]:
    """The words of all masks, bans included, and each spec's row in them or -1; at least one row."""
    everything = np.full(-(-vocab // 32), -1, dtype=np.int32)
    words: list[NDArray[np.int32]] = []
    rows = []
    for spec in specs:
        if spec.mask is None and not spec.banned:
            rows.append(-1)
            continue
        allowed = everything if spec.mask is None else spec.mask.words()
        kept = allowed.copy()
        for token in spec.banned:
            kept.view(np.uint32)[token // 32] &= ~np.uint32(1 << (token % 32))
        rows.append(len(words))
        # As on the CPU: bans that leave nothing of what the mask allows are passed over.
        words.append(kept if kept.any() else allowed)
    return np.stack(words or [everything]), rows
