"""How the time of a step grows with the batch and its context, beside what arithmetic says that it must."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from benchmarks.limit import BYTES_PER_WEIGHT, Limits, attention_operations, decode_weights
from covey.model.config import ModelConfig

GRID = tuple((rows, context) for rows in (1, 4, 8, 16, 32) for context in (128, 512, 1024))
"""Sequences of a step, and tokens that each of them has in the cache."""

QUICK_GRID = tuple((rows, context) for rows in (1, 8, 32) for context in (128, 1024))


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One step: `rows` sequences of `context` tokens each took `seconds`."""

    rows: int
    context: int
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Growth:
    """A step takes `base_s + row_s * rows + token_s * (all tokens of context)`; `r2`: how well that explains it."""

    base_s: float
    row_s: float
    token_s: float
    r2: float

    def seconds(self, rows: int, context: int) -> float:
        """What the fit says about a step."""
        return self.base_s + self.row_s * rows + self.token_s * rows * context


def fit(points: Sequence[Point]) -> Growth:
    """Least squares of relative errors: a millisecond is much in a short step and little in a long one."""
    seconds = np.array([point.seconds for point in points])
    terms = np.array([[1.0, point.rows, point.rows * point.context] for point in points])
    (base_s, row_s, token_s), *_ = np.linalg.lstsq(terms / seconds[:, None], np.ones(len(points)), rcond=None)
    left = seconds - terms @ np.array([base_s, row_s, token_s])
    r2 = 1.0 - float((left**2).sum() / ((seconds - seconds.mean()) ** 2).sum())
    return Growth(base_s=float(base_s), row_s=float(row_s), token_s=float(token_s), r2=r2)


def arithmetic(config: ModelConfig, limits: Limits, precision: str, kv_bytes_per_token: float) -> Growth:
    """The same three numbers from the machine's limits: reading the weights once, a row's products, a token's keys and
    values (read, or multiplied, whichever takes longer). In the roofline of `Limits.decode_tokens_per_s` products and
    reads hide behind each other; here they add up.
    """
    weights = decode_weights(config)
    attention_s = attention_operations(config) / limits.product_rate("fp32")
    return Growth(
        base_s=weights * BYTES_PER_WEIGHT[precision] / limits.read_bytes_per_s,
        row_s=2 * weights / limits.product_rate(precision),
        token_s=max(kv_bytes_per_token / limits.read_bytes_per_s, attention_s),
        r2=1.0,
    )
