"""What this machine can do at best, measured in the same run, and the token rates that follow from it (roofline)."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from covey.clock import Clock
from covey.model.config import ModelConfig

READ_FLOATS = 1 << 27
PRODUCT_SIZES = (1024, 2048)
REPEATS = 5
BYTES_PER_WEIGHT = {"fp32": 4, "bf16": 2, "int8": 1}
_RATES_OF = {"fp32": ("fp32",), "bf16": ("fp32", "bf16"), "int8": ("fp32", "bf16", "int8")}
"""Which products may compute weights of a precision: numbers may be widened, never narrowed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """The machine's best: bytes read a second in a stream, and operations a second in a large product, by precision."""

    read_bytes_per_s: float
    operations_per_s: Mapping[str, float]

    def product_rate(self, precision: str) -> float:
        """The best rate at which weights of a precision can be multiplied."""
        return max(self.operations_per_s.get(kind, 0.0) for kind in _RATES_OF[precision])

    def decode_tokens_per_s(
        self,
        config: ModelConfig,
        *,
        precision: str = "fp32",
        batch: int = 1,
        context: int = 0,
        kv_bytes_per_token: float = 0.0,
    ) -> float:
        """The most that `batch` sequences of `context` tokens can decode together: a step reads every weight once."""
        weights = decode_weights(config)
        read = weights * BYTES_PER_WEIGHT[precision] + batch * context * kv_bytes_per_token
        products_s = 2 * batch * weights / self.product_rate(precision)
        attention_s = batch * context * attention_operations(config) / self.product_rate("fp32")
        return batch / max(read / self.read_bytes_per_s, products_s + attention_s)

    def prefill_tokens_per_s(self, config: ModelConfig, tokens: int, *, precision: str = "fp32") -> float:
        """The most for one prompt of `tokens` tokens, with logits for its last one only."""
        head = head_weights(config)
        layers = decode_weights(config) - head
        read_s = (layers + head) * BYTES_PER_WEIGHT[precision] / self.read_bytes_per_s
        products_s = 2 * (layers * tokens + head) / self.product_rate(precision)
        attention_s = tokens * (tokens + 1) / 2 * attention_operations(config) / self.product_rate("fp32")
        return tokens / max(read_s, products_s + attention_s)


def decode_weights(config: ModelConfig) -> int:
    """How many weights one decoded token multiplies: every matrix and the head, not the table of embeddings."""
    q, kv = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
    attention = config.hidden * (q + 2 * kv) + q * config.hidden
    layer = attention + 3 * config.hidden * config.intermediate
    return config.n_layers * layer + head_weights(config)


def head_weights(config: ModelConfig) -> int:
    """Weights of the last matrix, which gives the logits."""
    return config.vocab_size * config.hidden


def attention_operations(config: ModelConfig) -> int:
    """Operations that one query spends on one key and its value, over all heads and layers."""
    return 4 * config.n_heads * config.head_dim * config.n_layers


def measure(clock: Clock, *, read_floats: int = READ_FLOATS, sizes: tuple[int, ...] = PRODUCT_SIZES) -> Limits:
    """Best of several ways and a few repeats on all cores; takes some seconds and 512 MiB."""
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    rates = {"fp32": 0.0, "bf16": 0.0, "int8": 0.0}
    for size in sizes:
        for kind, product in _products(size).items():
            rates[kind] = max(rates[kind], 2 * size**3 / _best_s(product, clock))
    return Limits(read_bytes_per_s=_read_rate(read_floats, clock), operations_per_s=rates)


def _read_rate(floats: int, clock: Clock) -> float:
    """A sum, a maximum, and a product with a vector: which reads fastest depends on the processor."""
    memory = torch.ones(floats)
    rows, vector = memory.view(-1, 1024), torch.ones(1024)
    best_s = min(_best_s(work, clock) for work in (memory.sum, memory.amax, lambda: rows @ vector))
    return 4 * floats / best_s


def _products(size: int) -> dict[str, Callable[[], torch.Tensor]]:
    left, right = torch.randn(2, size, size).unbind()
    left_bf16, right_bf16 = left.bfloat16(), right.bfloat16()
    left_int8, right_int8 = left.clamp(-1, 1).mul(127).to(torch.int8), right.clamp(-1, 1).mul(127).to(torch.int8)
    return {
        "fp32": lambda: left @ right,
        "bf16": lambda: left_bf16 @ right_bf16,
        "int8": lambda: torch._int_mm(left_int8, right_int8),  # noqa: SLF001 - torch has no public name for it
    }


def _best_s(work: Callable[[], torch.Tensor], clock: Clock) -> float:
    best = float("inf")
    for _ in range(REPEATS):
        began = clock.now()
        work()
        best = min(best, clock.now() - began)
    return best
