"""Draws a token a row from masked logits: temperature, top-k, top-p, min-p and a given uniform number, in one kernel.

Thresholds are found by bisection on the logits' bits, which order as integers do, so there is no sort: a threshold
costs 32 passes over a row that stays in cache.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

_BLOCK = 4096
"""Logits of one load, at most."""

NOT_FINITE = -1
"""Instead of a token: the best logit is not finite, or the mask leaves nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DrawSettings:
    """The settings of each row of logits, on the device.

    `temperature` 0 is greedy; `top_k` 0 and `top_p` 1 are off; `uniform` is in [0, 1); `mask_row` is the row of `masks`
    (int32, [*, ceil(vocab / 32)], bit i % 32 of word i // 32 set where token i is allowed) or -1.
    """

    temperature: torch.Tensor
    top_k: torch.Tensor
    top_p: torch.Tensor
    min_p: torch.Tensor
    uniform: torch.Tensor
    mask_row: torch.Tensor
    masks: torch.Tensor


@triton.jit
def _masked_logits(logits, mask, mask_row, token, vocab):
    """Logits of a stretch; -inf outside the vocabulary and the mask. NaN stays NaN."""
    inside = token < vocab
    x = tl.load(logits + token, mask=inside, other=float("-inf")).to(tl.float32)
    word = tl.where(mask_row >= 0, tl.load(mask + token // 32, mask=inside, other=0), -1)
    allowed = ((word >> (token % 32)) & 1) == 1
    return tl.where(allowed & inside, x, float("-inf"))


@triton.jit
def _ordered(x):
    """Integers that order as the numbers do."""
    bits = x.to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
def _mass(logits, mask, mask_row, vocab, least, top, inverse, by_count, block: tl.constexpr):
    """How many logits are at or above `least` (as ordered integers), or their summed unnormalised probability."""
    found = tl.zeros((block,), tl.float32)
    for at in range(0, vocab, block):
        token = at + tl.arange(0, block)
        x = _masked_logits(logits, mask, mask_row, token, vocab)
        kept = (_ordered(x) >= least) & (x > float("-inf"))
        probability = tl.exp((tl.where(kept, x, top) - top) * inverse)
        found += tl.where(kept, tl.where(by_count, 1.0, probability), 0.0)
    return tl.sum(found, axis=0)


@triton.jit
def _threshold(logits, mask, mask_row, vocab, low, high, wanted, top, inverse, by_count, block: tl.constexpr):
    """The highest threshold from `low` to `high` whose mass is at least `wanted`; `low` always has it."""
    low, high = low.to(tl.int64), high.to(tl.int64)
    for _ in range(32):
        middle = (low + high + 1) >> 1
        enough = _mass(logits, mask, mask_row, vocab, middle, top, inverse, by_count, block) >= wanted
        low = tl.where(enough, middle, low)
        high = tl.where(enough, high, middle - 1)
    return low


@triton.jit
def _best(logits, mask, mask_row, vocab, block: tl.constexpr):
    """The highest logit, the first token that has it, and whether there is a NaN."""
    top = tl.full((1,), float("-inf"), tl.float32)
    best = tl.zeros((1,), tl.int32)
    is_broken = tl.zeros((1,), tl.int32)
    for at in range(0, vocab, block):
        token = at + tl.arange(0, block)
        x = _masked_logits(logits, mask, mask_row, token, vocab)
        is_nan = x != x  # noqa: PLR0124 - this is how a kernel asks for NaN
        is_broken = tl.maximum(is_broken, tl.max(is_nan.to(tl.int32), axis=0))
        x = tl.where(is_nan, float("-inf"), x)
        highest = tl.max(x, axis=0)
        first = tl.min(tl.where(x == highest, token, 1 << 30), axis=0)
        best = tl.where(highest > top, first, best)
        top = tl.maximum(top, highest)
    return top, best, is_broken


@triton.jit
def _pick(logits, mask, mask_row, vocab, least, top, inverse, uniform, block: tl.constexpr):
    """The token, in ascending order, at which the kept probabilities pass `uniform` times their sum."""
    goal = uniform * _mass(logits, mask, mask_row, vocab, least, top, inverse, False, block)
    running = tl.zeros((1,), tl.float32)
    found = tl.full((1,), 1 << 30, tl.int32)
    last = tl.zeros((1,), tl.int32)
    for at in range(0, vocab, block):
        token = at + tl.arange(0, block)
        x = _masked_logits(logits, mask, mask_row, token, vocab)
        kept = (_ordered(x) >= least) & (x > float("-inf"))
        probability = tl.where(kept, tl.exp((tl.where(kept, x, top) - top) * inverse), 0.0)
        passed = kept & (running + tl.cumsum(probability, axis=0) > goal)
        found = tl.minimum(found, tl.min(tl.where(passed, token, 1 << 30), axis=0))
        last = tl.maximum(last, tl.max(tl.where(probability > 0.0, token, 0), axis=0))
        running += tl.sum(probability, axis=0)
    # Rounding can leave the goal a hair above the last sum.
    return tl.where(found == 1 << 30, last, found)


@triton.jit
def _draw_kernel(
    logits,
    out,
    temperatures,
    top_ks,
    top_ps,
    min_ps,
    uniforms,
    mask_rows,
    masks,
    vocab,
    stride,
    mask_stride,
    block: tl.constexpr,
):
    row = tl.program_id(0)
    logits += row.to(tl.int64) * stride
    mask_row = tl.load(mask_rows + row)
    mask = masks + tl.maximum(mask_row, 0).to(tl.int64) * mask_stride
    top, token, is_broken = _best(logits, mask, mask_row, vocab, block)
    is_fine = (is_broken == 0) & (tl.abs(top) < float("inf"))
    temperature = tl.load(temperatures + row)
    if (temperature > 0.0) & (tl.min(is_fine.to(tl.int32), axis=0) == 1):
        inverse = 1.0 / temperature
        highest = _ordered(top)
        least = tl.full((1,), -0x80000000, tl.int64)
        top_k = tl.load(top_ks + row)
        if (top_k > 0) & (top_k < vocab):
            least = _threshold(logits, mask, mask_row, vocab, least, highest, top_k, top, inverse, True, block)
        top_p = tl.load(top_ps + row)
        min_p = tl.load(min_ps + row)
        floor = least
        if min_p > 0.0:
            floor = tl.maximum(least, _ordered(top + tl.log(min_p) * temperature).to(tl.int64))
        if top_p < 1.0:
            whole = _mass(logits, mask, mask_row, vocab, least, top, inverse, False, block)
            wanted = top_p * whole
            least = _threshold(logits, mask, mask_row, vocab, least, highest, wanted, top, inverse, False, block)
        least = tl.minimum(tl.maximum(least, floor), highest.to(tl.int64))
        token = _pick(logits, mask, mask_row, vocab, least, top, inverse, tl.load(uniforms + row), block)
    tl.store(out + row + tl.zeros((1,), tl.int32), tl.where(is_fine, token, -1).to(tl.int64))


def draw_tokens(logits: torch.Tensor, settings: DrawSettings) -> torch.Tensor:
    """A token (int64) for each row of `logits` [n, vocab], rows of any stride, or `NOT_FINITE`.

    Order: mask, temperature, top-k, top-p, min-p; tokens as likely as the last one kept are kept too. The draw is the
    first token, in ascending order, at which the kept probabilities pass `uniform` times their sum.
    """
    n, vocab = logits.shape
    out = torch.empty(n, dtype=torch.int64, device=logits.device)
    if n:
        _draw_kernel[(n,)](
            logits,
            out,
            settings.temperature,
            settings.top_k,
            settings.top_p,
            settings.min_p,
            settings.uniform,
            settings.mask_row,
            settings.masks,
            vocab,
            logits.stride(0),
            settings.masks.stride(0),
            block=min(_BLOCK, triton.next_power_of_2(vocab)),
        )
    return out


def draw_tokens_reference(logits: torch.Tensor, settings: DrawSettings) -> torch.Tensor:
    """The same in torch, by sorting."""
    n, vocab = logits.shape
    tokens = torch.arange(vocab, device=logits.device)
    words = settings.masks[settings.mask_row.clamp(min=0).long()][:, tokens // 32]
    allowed = ((words >> (tokens % 32)) & 1 == 1) | (settings.mask_row < 0)[:, None]
    x = logits.float().masked_fill(~allowed, -torch.inf)
    return torch.stack([_draw_row(x[i], settings, i) for i in range(n)]) if n else tokens[:0]


def _draw_row(x: torch.Tensor, settings: DrawSettings, row: int) -> torch.Tensor:
    best, token = x.max(dim=0)  # NaN wins
    temperature = settings.temperature[row]
    if not best.isfinite():
        return torch.full_like(token, NOT_FINITE)
    if temperature <= 0:
        return token
    kept = x > -torch.inf
    if 0 < (top_k := int(settings.top_k[row])) < len(x):
        kept &= x >= x.topk(top_k).values[-1]
    weights = torch.where(kept, torch.exp((x - best) / temperature), 0.0)
    relative = weights.clone()
    if (top_p := settings.top_p[row]) < 1:
        order = weights.argsort(descending=True, stable=True)
        reach = weights[order].cumsum(dim=0)
        needed = min(int((reach < top_p * reach[-1]).sum()), len(x) - 1)
        kept &= weights >= weights[order[needed]]
    kept &= relative >= settings.min_p[row]
    reach = torch.where(kept, weights, 0.0).cumsum(dim=0)
    at = int(torch.searchsorted(reach, settings.uniform[row] * reach[-1], right=True))
    return torch.minimum(torch.tensor(at, device=x.device), kept.nonzero().max())
