"""Batching policies by the name that a configuration gives them."""

from __future__ import annotations

from .batch_limits import BatchLimits
from .batching import Batcher
from .first_come import FirstCome
from .pace import Pace


def make_batcher(limits: BatchLimits, *, n_layers: int) -> Batcher:
    """The batcher that `limits.batching` names, for a model of `n_layers`."""
    pace = Pace(tokens_min=limits.chunk_min)
    return Batcher(limits, FirstCome(limits, pace), pace, n_layers=n_layers)
