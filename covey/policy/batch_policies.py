"""Batching policies by the name that a configuration gives them."""

from __future__ import annotations

from .batch_limits import BatchLimits
from .batching import Batcher
from .cutting import Cutting
from .laps import LapsLimits, ShortAndLong
from .layered import LayeredPrefill
from .order import ByArrival, Order, ShortFirst
from .pace import Pace
from .split_fuse import SplitFuse
from .urgency import ByUrgency
from .whole_prompts import WholePrompts


def make_batcher(limits: BatchLimits, *, n_layers: int, laps: LapsLimits | None = None) -> Batcher:
    """The batcher that `limits.batching` names, for a model of `n_layers`."""
    pace = Pace(tokens_min=limits.chunk_min)
    order, cutting = _parts(limits, laps or LapsLimits(), pace, n_layers)
    return Batcher(limits, order, cutting, pace, n_layers=n_layers)


def _parts(limits: BatchLimits, laps: LapsLimits, pace: Pace, n_layers: int) -> tuple[Order, Cutting]:
    match limits.batching:
        case "fcfs":
            return ByArrival(), SplitFuse(limits, pace)
        case "layered":
            return ByArrival(), LayeredPrefill(limits, pace, n_layers=n_layers)
        case "laps":
            order = ShortFirst(short_max=laps.short_max, patience_s=limits.patience_s)
            return order, ShortAndLong(limits, pace, laps)
        case "flow":
            urgency = ByUrgency(pace, patience_s=limits.patience_s)
            return urgency, WholePrompts(limits, pace, urgency, n_layers=n_layers)
