"""What bounds a batch, whatever the policy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from .pace import Pace

Batching = Literal["fcfs", "layered", "laps", "flow"]
"""Names of the batching policies."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchLimits:
    """Bounds of a batch. Raises ValueError when a full batch of decoding sequences would leave prefill no token."""

    batching: Batching = "fcfs"
    """How sequences are ordered and prompts cut."""
    max_tokens: int = 512
    """New tokens a step, decoding and prefilling together."""
    max_running: int = 64
    """Sequences that hold blocks at once."""
    queue_max: int = 256
    """Sequences that wait for room."""
    step_target_s: float = 0.2
    """How long a step should last: prefill chunks shrink to it, because cancellation waits for a step."""
    chunk_min: int = 64
    """The prefill budget never shrinks below this many tokens: smaller ones mostly pay for reading the weights."""
    prompt_tokens_max: int = 8192
    """Prompt tokens in flight at once where prompts are computed whole, layers apart: `layered` and `flow`."""
    patience_s: float = 30.0
    """Who has waited longer than this is overtaken by nobody, whatever the policy."""
    preemptions_max: int = 3
    """Who was preempted this often is preempted again only when there is nobody else."""

    def __post_init__(self) -> None:
        counts = (self.max_tokens, self.max_running, self.chunk_min, self.prompt_tokens_max)
        if min(counts) < 1 or min(self.queue_max, self.preemptions_max) < 0:
            raise ValueError("every limit must be positive (queue_max and preemptions_max may be 0)")
        if min(self.step_target_s, self.patience_s) <= 0:
            raise ValueError("every time must be positive")
        if self.max_running >= self.max_tokens:
            raise ValueError("max_running must be less than max_tokens, or a full batch would starve prefill")

    @property
    def step_tokens_max(self) -> int:
        """New tokens that a step may have in the worst case: decoding goes on beside a chunk that was suspended."""
        prompts = self.prompt_tokens_max if self.batching in {"layered", "flow"} else self.max_tokens
        return max(self.max_tokens, prompts) + self.max_running

    def prefill_budget(self, pace: Pace, decoding: int) -> int:
        """Prompt tokens for a step that also computes `decoding` others."""
        fits = pace.fits(self.step_target_s)
        target = min(64, self.max_tokens) if fits is None else fits - decoding
        return min(self.max_tokens - decoding, max(self.chunk_min, target))
