"""Layered prefill: whole prompts, a group of layers a step, while the other sequences decode through all layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate

from .batch_limits import BatchLimits
from .chunk import Chunk
from .cutting import cut, resume
from .ledger import Entry
from .pace import Pace


def groups_for(tokens: int, unit: int, n_layers: int) -> int:
    """Steps that a batch of prompts takes: doubled until a step's share is at most `unit` tokens' work.

    With a unit of 512 these are the published 1, 2, 4, 8 and 16 for up to 512, 1,024, 2,048, 4,096 and more tokens.
    """
    groups = 1
    while groups < n_layers and tokens > groups * unit:
        groups *= 2
    return min(groups, n_layers)


def bounds_of(n_layers: int, groups: int) -> tuple[int, ...]:
    """Where each of `groups` groups of layers ends; the first ones have one layer more when it does not divide."""
    size, extra = divmod(n_layers, groups)
    return tuple(accumulate(size + (group < extra) for group in range(groups)))


class LayeredPrefill:
    """Reads each layer's weights once for a batch of prompts, not once a chunk. A batch enters when none is in flight.

    The number of groups follows what a step may take on this machine.
    """

    wakes_at: float | None = None
    interrupts_at: float | None = None

    def __init__(self, limits: BatchLimits, pace: Pace, *, n_layers: int) -> None:
        self._limits = limits
        self._pace = pace
        self._n_layers = n_layers
        self._bounds: tuple[int, ...] = ()

    def prefill(self, ready: Sequence[Entry], decoding: int, now: float) -> list[Chunk]:
        """The next group of layers of the batch in flight, or the first one of a new batch."""
        if in_flight := resume(ready, self._bound):
            return in_flight
        batch = cut(ready, self._limits.prompt_tokens_max)
        tokens = sum(chunk.count for chunk in batch)
        unit = self._limits.prefill_budget(self._pace, decoding)
        self._bounds = bounds_of(self._n_layers, groups_for(tokens, unit, self._n_layers))
        return [replace(chunk, last_layer=self._bound(0)) for chunk in batch]

    def _bound(self, layer: int) -> int | None:
        end = next((bound for bound in self._bounds if bound > layer), self._n_layers)
        return end if end < self._n_layers else None
