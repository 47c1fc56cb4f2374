"""Rotary position embedding; a head's rotary pairs are adjacent."""

from __future__ import annotations

import math

import torch

from .config import ModelConfig, RopeScaling


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
    """Cosine and sine of each pair at each position: [token, head_dim / 2, 2]."""
    angles = torch.outer(positions, frequencies)
    return torch.stack((angles.cos(), angles.sin()), dim=-1)


def rotate(heads: torch.Tensor, phases: torch.Tensor) -> torch.Tensor:
    """Turn the pairs of [token, head, head_dim]."""
    pairs = torch.view_as_complex(heads.reshape(*heads.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * torch.view_as_complex(phases)[:, None]).flatten(-2)
