"""Draws one token from a row of logits; the draw depends on nothing but the row, its spec, and (seed, position)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from .plan import Draw, SampleSpec

_Logits = NDArray[np.float32]
_Probabilities = NDArray[np.float64]
_Ids = NDArray[np.int64]

_WORD = (1 << 64) - 1


def draw(logits: _Logits, spec: SampleSpec) -> Draw:
    """Draw from `logits` [vocab], which stay unchanged.

    Order: repetition, presence and frequency penalties, bias, bans, temperature, top-k, top-p, min-p. The reported log
    probabilities are the model's own, before all of these.
    """
    adjusted = _adjust(logits, spec)
    token = int(np.argmax(adjusted)) if spec.temperature <= 0.0 else _draw_random(adjusted, spec)
    if spec.logprobs is None:
        return Draw(token=token)
    normaliser = _log_sum_exp(logits)
    best = _best(logits, spec.logprobs)
    return Draw(
        token=token,
        logprob=float(logits[token] - normaliser),
        top=tuple((int(i), float(logits[i] - normaliser)) for i in best),
    )


def uniform(seed: int, position: int) -> float:
    """The random number of one draw in [0, 1): Philox keyed by (seed, position), the same on every worker."""
    key = np.array([seed & _WORD, position & _WORD], dtype=np.uint64)
    return float(np.random.Generator(np.random.Philox(key=key)).random())


def _adjust(logits: _Logits, spec: SampleSpec) -> _Logits:
    if not (spec.has_penalty or spec.logit_bias or spec.banned):
        return logits
    adjusted = logits.copy()
    if spec.has_penalty:
        _penalise(adjusted, spec)
    for token, bias in spec.logit_bias:
        adjusted[token] += bias
    if spec.banned:
        adjusted[list(spec.banned)] = -np.inf
    return adjusted


def _penalise(logits: _Logits, spec: SampleSpec) -> None:
    seen = np.unique(np.asarray(spec.history, dtype=np.int64))
    if spec.repetition_penalty != 1.0 and seen.size:
        values = logits[seen]
        logits[seen] = np.where(values > 0, values / spec.repetition_penalty, values * spec.repetition_penalty)
    generated, counts = np.unique(np.asarray(spec.history[spec.prompt_len :], dtype=np.int64), return_counts=True)
    if generated.size:
        logits[generated] -= (spec.presence_penalty + spec.frequency_penalty * counts).astype(np.float32)


def _draw_random(logits: _Logits, spec: SampleSpec) -> int:
    ids, weights = _candidates(logits, spec)
    cumulative = np.cumsum(weights)
    at = np.searchsorted(cumulative, uniform(spec.seed, spec.position) * cumulative[-1], side="right")
    return int(ids[min(int(at), ids.size - 1)])


def _candidates(logits: _Logits, spec: SampleSpec) -> tuple[_Ids, _Probabilities]:
    """The ids that may be drawn, ascending, and their unnormalised probabilities.

    Ascending ids keep the draw where float noise swaps two tokens of almost equal probability.
    """
    ids: _Ids = np.arange(logits.size)
    if 0 < spec.top_k < logits.size:
        ids = np.sort(np.argpartition(logits, -spec.top_k)[-spec.top_k :])
    scaled = logits[ids].astype(np.float64) / spec.temperature
    weights = np.exp(scaled - scaled.max())
    if spec.top_p < 1.0:
        keep = _nucleus(weights, spec.top_p)
        ids, weights = ids[keep], weights[keep]
    keep = weights >= spec.min_p if spec.min_p > 0.0 else weights > 0.0
    return ids[keep], weights[keep]


def _nucleus(weights: _Probabilities, top_p: float) -> _Ids:
    """Indices, ascending, of the fewest most probable entries whose probabilities reach `top_p`; at least one.

    Entries below (1 - top_p) / n of the total can never belong, so only the others are sorted.
    """
    total = weights.sum()
    likely = np.flatnonzero(weights >= (1.0 - top_p) / weights.size * total)
    if likely.size == 0:
        likely = np.array([int(np.argmax(weights))])
    order = likely[np.argsort(-weights[likely], kind="stable")]
    reach = np.cumsum(weights[order])
    count = int(np.searchsorted(reach, max(top_p, 0.0) * total, side="left")) + 1
    kept: _Ids = np.sort(order[:count])
    return kept


def _log_sum_exp(logits: _Logits) -> float:
    top = float(logits.max())
    return top + float(np.log(np.exp(logits.astype(np.float64) - top).sum()))


def _best(logits: _Logits, count: int) -> _Ids:
    count = min(count, logits.size)
    if count <= 0:
        return np.empty(0, dtype=np.int64)
    found = np.argpartition(logits, -count)[-count:]
    ordered: _Ids = found[np.argsort(-logits[found], kind="stable")]
    return ordered
