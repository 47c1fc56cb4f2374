"""Draws one token from a row of logits; the draw depends on nothing but the row, its spec, and (seed, position)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from .plan import Draw, SampleSpec

_Logits = NDArray[np.float32]
_Probabilities = NDArray[np.float64]
_Ids = NDArray[np.int64]

_WORD = (1 << 64) - 1
_FEW = 8
"""A mask with bits in less than one in so many words makes the rest of a draw work on their tokens alone."""
_MANY = 4096
"""From so many values on, single precision and stripes save more than they cost."""
_STRIPE = 256
_COLD = 1e-3
"""Below this temperature single precision would divide by nearly nothing."""


def draw(logits: _Logits, spec: SampleSpec) -> Draw:
    """Draw from `logits` [vocab], which stay unchanged.

    Order: repetition, presence and frequency penalties, bias, bans, mask, temperature, top-k, top-p, min-p. Reported
    log probabilities are the model's own, before all of these.
    """
    token = _draw_token(_adjust(logits, spec), spec)
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


def _draw_token(adjusted: _Logits, spec: SampleSpec) -> int:
    is_greedy = spec.temperature <= 0.0
    best = int(np.argmax(adjusted)) if is_greedy else -1
    if spec.mask is None:
        return best if is_greedy else _draw_random(adjusted, spec)
    words = spec.mask.words()
    if is_greedy and words[best >> 5] >> (best & 31) & 1:
        return best  # what a model wants most is usually allowed
    values, ids = _allowed(adjusted, words)
    at = int(np.argmax(values)) if is_greedy else _draw_random(values, spec)
    return at if ids is None else int(ids[at])


def _allowed(logits: _Logits, words: NDArray[np.int32]) -> tuple[_Logits, _Ids | None]:
    """The logits of what a mask allows, and their ids where these are not simply their places."""
    used = np.flatnonzero(words)
    if used.size * _FEW < words.size:
        bits = np.unpackbits(words[used].view(np.uint8), bitorder="little").view(np.bool_)
        at = np.flatnonzero(bits)
        ids: _Ids = used[at >> 5] * 32 + (at & 31)
        return logits[ids], ids
    allowed = np.unpackbits(words.view(np.uint8), bitorder="little")[: logits.size].view(np.bool_)
    return np.where(allowed, logits, np.float32(-np.inf)), None


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


def _draw_random(values: _Logits, spec: SampleSpec) -> int:
    """The place of the drawn value; ascending places keep the draw where noise swaps two of almost equal value."""
    share = uniform(spec.seed, spec.position)
    is_plain = spec.top_p >= 1.0 and spec.min_p <= 0.0 and not 0 < spec.top_k < values.size
    if is_plain and values.size >= _MANY and spec.temperature >= _COLD:
        return _pick_striped(_weights(values, spec.temperature), share)
    places, weights = _candidates(values, spec)
    return int(places[_pick(np.cumsum(weights), share)])


def _pick(cumulative: _Probabilities, share: float) -> int:
    at = int(np.searchsorted(cumulative, share * cumulative[-1], side="right"))
    return min(at, cumulative.size - 1)


def _pick_striped(weights: _Logits, share: float) -> int:
    """`_pick` over many weights: first the stripe, then the place in it."""
    starts = np.arange(0, weights.size, _STRIPE)
    cumulative = np.cumsum(np.add.reduceat(weights, starts, dtype=np.float64))
    stripe = _pick(cumulative, share)
    inside = weights[stripe * _STRIPE : (stripe + 1) * _STRIPE]
    before = cumulative[stripe - 1] if stripe else 0.0
    reach = np.cumsum(inside, dtype=np.float64)
    at = int(np.searchsorted(reach, share * cumulative[-1] - before, side="right"))
    last = int(np.flatnonzero(inside)[-1])
    return stripe * _STRIPE + min(at, last)


def _weights(values: _Logits, temperature: float) -> _Logits:
    """Unnormalised probabilities in single precision: a sixth of the time of double, at 1e-7 of their value."""
    found: _Logits = np.exp((values - values.max()) * np.float32(1.0 / temperature))
    return found


def _candidates(values: _Logits, spec: SampleSpec) -> tuple[_Ids, _Probabilities]:
    """The places that may be drawn, ascending, and their unnormalised probabilities."""
    top = float(values.max())
    total: float | None = None
    places: _Ids | None = np.sort(_largest(values, spec.top_k)) if 0 < spec.top_k < values.size else None
    if places is None and values.size >= _MANY and spec.temperature >= _COLD:
        places, total = _likely(values, spec)
    kept = values if places is None else values[places]
    weights = np.exp((kept.astype(np.float64) - top) / spec.temperature)
    if places is None:
        places = np.arange(values.size)
    if spec.top_p < 1.0:
        count = weights.size if total is None else values.size
        kept_places = _nucleus(weights, spec.top_p, weights.sum() if total is None else total, count)
        places, weights = places[kept_places], weights[kept_places]
    is_kept = weights >= spec.min_p if spec.min_p > 0.0 else weights > 0.0
    return places[is_kept], weights[is_kept]


def _likely(values: _Logits, spec: SampleSpec) -> tuple[_Ids, float]:
    """A superset of what top-p and min-p keep of many values, and the sum of all weights."""
    weights = _weights(values, spec.temperature)
    total = float(weights.sum(dtype=np.float64))
    least = max(spec.min_p, (1.0 - spec.top_p) / weights.size * total)
    found: _Ids = np.flatnonzero(weights >= np.float32(least * (1.0 - 1e-6)))
    return (found if found.size else np.array([int(np.argmax(values))])), total


def _nucleus(weights: _Probabilities, top_p: float, total: float, count: int) -> _Ids:
    """Indices, ascending, of the fewest most probable entries whose probabilities reach `top_p`; at least one.

    `weights` are those of the `count` entries that may belong: what is below (1 - top_p) / count of `total` cannot.
    """
    likely = np.flatnonzero(weights >= (1.0 - top_p) / count * total)
    if likely.size == 0:
        likely = np.array([int(np.argmax(weights))])
    order = likely[np.argsort(-weights[likely], kind="stable")]
    reach = np.cumsum(weights[order])
    needed = int(np.searchsorted(reach, max(top_p, 0.0) * total, side="left")) + 1
    kept: _Ids = np.sort(order[:needed])
    return kept


def _largest(values: _Logits, count: int) -> _Ids:
    """Places of the `count` largest values. The largest of each stripe bound the search of many values."""
    stripes = values.size // _STRIPE
    if count <= stripes:
        maxima = values[: stripes * _STRIPE].reshape(stripes, _STRIPE).max(axis=1)
        near: _Ids = np.flatnonzero(values >= np.partition(maxima, -count)[-count])
        return near[np.argpartition(values[near], -count)[-count:]]
    found: _Ids = np.argpartition(values, -count)[-count:]
    return found


def _log_sum_exp(logits: _Logits) -> float:
    top = float(logits.max())
    return top + float(np.log(np.exp(logits - np.float32(top)).sum(dtype=np.float64)))


def _best(logits: _Logits, count: int) -> _Ids:
    count = min(count, logits.size)
    if count <= 0:
        return np.empty(0, dtype=np.int64)
    found = np.sort(_largest(logits, count))
    ordered: _Ids = found[np.argsort(-logits[found], kind="stable")]
    return ordered
