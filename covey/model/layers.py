"""The plain pieces of a decoder layer, and the scratch memory that a step reuses."""

from __future__ import annotations

import math

import torch
from torch.nn import functional

from .config import ModelConfig, RopeScaling

_NARROW_ROWS = 4
"""Up to so many rows the transposed product is the faster one (measured, 2 cores, AVX-512)."""

_NARROW_ROWS_OF_TALL, _TALL_ROWS = 8, 16384
"""The same for a matrix as tall as a vocabulary."""


class Scratch:
    """Named buffers that grow to the largest step seen and are then reused, so that a step allocates nothing large."""

    def __init__(self) -> None:
        self._flat: dict[str, torch.Tensor] = {}

    def take(self, name: str, *shape: int) -> torch.Tensor:
        """A contiguous fp32 buffer of `shape`; its content is whatever the last user left."""
        count = math.prod(shape)
        flat = self._flat.get(name)
        if flat is None or flat.numel() < count:
            flat = self._flat[name] = torch.empty(count)
        return flat[:count].view(shape)


def product(x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor) -> None:
    """Fill `out` [row, out] with `x` [row, in] times the transpose of `weight` [out, in]."""
    if _is_narrow(x.shape[0], weight):
        out.copy_(_transposed_product(x, weight))
    else:
        torch.mm(x, weight.t(), out=out)


def add_product(hidden: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> None:
    """Add the same product to `hidden` in place."""
    if _is_narrow(x.shape[0], weight):
        hidden.add_(_transposed_product(x, weight))
    else:
        hidden.addmm_(x, weight.t())


def _is_narrow(rows: int, weight: torch.Tensor) -> bool:
    return rows <= (_NARROW_ROWS if weight.shape[0] < _TALL_ROWS else _NARROW_ROWS_OF_TALL)


def _transposed_product(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    # MKL streams the weights up to twice as fast with few rows on the right, but not with a single one. The second row
    # is a real copy: torch takes a slow path of its own for a broadcast operand.
    rows = x.shape[0]
    right = x if rows > 1 else x.repeat(2, 1)
    return torch.mm(weight, right.t()).t()[:rows]


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Root-mean-square normalisation over the last dimension."""
    return functional.rms_norm(x, weight.shape, weight, eps)


def gated(gate_up: torch.Tensor) -> torch.Tensor:
    """SwiGLU of a fused [rows, 2 * width] product: silu(gate) * up."""
    gate, up = gate_up.chunk(2, dim=1)
    return functional.silu(gate).mul_(up)


def inverse_frequencies(config: ModelConfig) -> torch.Tensor:
    """Rotary frequencies in radians a position; in fp32 throughout, as the reference computes them."""
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.int64).float() / config.head_dim
    plain = 1.0 / (config.rope_theta**exponents)
    if config.rope_scaling is None:
        return plain
    if config.rope_scaling.kind == "linear":
        return plain / config.rope_scaling.factor
    return _llama3_frequencies(plain, config.rope_scaling)


def _llama3_frequencies(plain: torch.Tensor, scaling: RopeScaling) -> torch.Tensor:
    wavelengths = 2 * math.pi / plain
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    smooth = (scaling.original_context / wavelengths - low) / (high - low)
    blended = (1 - smooth) * plain / scaling.factor + smooth * plain
    stretched = torch.where(wavelengths > scaling.original_context / low, plain / scaling.factor, plain)
    middle = (wavelengths <= scaling.original_context / low) & (wavelengths >= scaling.original_context / high)
    return torch.where(middle, blended, stretched)


def rotary_phases(positions: torch.Tensor, frequencies: torch.Tensor) -> torch.Tensor:
    """Unit complex numbers [row, 1, head_dim / 2] that turn a head at each position."""
    angles = torch.outer(positions, frequencies)
    return torch.complex(angles.cos(), angles.sin()).unsqueeze(1)


def rotate(heads: torch.Tensor, phases: torch.Tensor) -> None:
    """Turn [row, head, head_dim] in place; a head's rotary pairs are adjacent."""
    rows, count, width = heads.shape
    torch.view_as_complex(heads.view(rows, count, width // 2, 2)).mul_(phases)
