"""What one step computes of one sequence."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunk:
    """Compute `count` known tokens of a sequence from position `start`; `is_last`: the next one is unknown.

    `draft` guesses may follow a last chunk. A chunk may run through some layers only, `first_layer` up to, not
    including, `last_layer` (None: to the end); the same start and count then come again until the end is reached. All
    such chunks of a plan share one range, and none has a draft.
    """

    seq: int
    start: int
    count: int
    is_last: bool
    draft: int = 0
    first_layer: int = 0
    last_layer: int | None = None

    @property
    def tokens(self) -> int:
        """New tokens of the row: known ones and guesses."""
        return self.count + self.draft

    @property
    def is_drawn(self) -> bool:
        """Whether a token is drawn when the chunk runs as planned."""
        return self.is_last and self.last_layer is None

    def share(self, n_layers: int, *, until: int | None) -> float:
        """The part of the chunk's work that is done from `first_layer` to `until` (None: to the end)."""
        return ((n_layers if until is None else until) - self.first_layer) / n_layers
