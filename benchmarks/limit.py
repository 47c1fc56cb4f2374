"""What this machine can do at best, measured in the same run, and the decode rate that follows from it (roofline)."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass

import torch

from covey.clock import Clock
from covey.model.config import ModelConfig

READ_FLOATS = 1 << 27
PRODUCT_SIZE = 2048
REPEATS = 7
BYTES_PER_WEIGHT = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """The machine's best: bytes read a second in a stream, and fp32 operations a second in a large product."""

    read_bytes_per_s: float
    operations_per_s: float

    def decode_tokens_per_s(self, config: ModelConfig) -> float:
        """The most that fp32 decoding at batch 1 can reach: each token reads every weight once."""
        weights = decode_weights(config)
        return 1.0 / max(weights * BYTES_PER_WEIGHT / self.read_bytes_per_s, 2 * weights / self.operations_per_s)


def decode_weights(config: ModelConfig) -> int:
    """How many weights one decoded token multiplies: every matrix and the head, not the table of embeddings."""
    q, kv = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
    attention = config.hidden * (q + 2 * kv) + q * config.hidden
    layer = attention + 3 * config.hidden * config.intermediate
    return config.n_layers * layer + config.vocab_size * config.hidden


def measure(clock: Clock) -> Limits:
    """Best of a few repeats on all cores; takes about two seconds and 512 MiB."""
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    memory = torch.ones(READ_FLOATS)
    read_s = _best_s(memory.sum, clock)
    del memory
    left, right = torch.randn(2, PRODUCT_SIZE, PRODUCT_SIZE).unbind()
    product_s = _best_s(lambda: left @ right, clock)
    return Limits(read_bytes_per_s=4 * READ_FLOATS / read_s, operations_per_s=2 * PRODUCT_SIZE**3 / product_s)


def _best_s(work: Callable[[], torch.Tensor], clock: Clock) -> float:
    best = float("inf")
    for _ in range(REPEATS):
        began = clock.now()
        work()
        best = min(best, clock.now() - began)
    return best
