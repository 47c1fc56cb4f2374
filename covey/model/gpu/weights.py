"""The weights of a model in device memory, as the products want them."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from covey.errors import NoSpace
from covey.model.config import ModelConfig
from covey.model.weights import LayerWeights, Weights

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

_PAIR = 16
"""Gates, and then values, that lie together in the fused matrix of the CPU's file."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceLayer:
    """One block of the decoder: matrices [in, out] (views of [out, in]) in the precision, norms in fp32."""

    attn_norm: torch.Tensor
    qkv: torch.Tensor
    qkv_bias: torch.Tensor | None
    head_norms: tuple[torch.Tensor, torch.Tensor] | None
    o: torch.Tensor
    mlp_norm: torch.Tensor
    gate_up: torch.Tensor
    down: torch.Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceWeights:
    """A whole model. `embed` is [vocab, hidden] and `head` [hidden, vocab]; they share memory where they are tied."""

    dtype: torch.dtype
    embed: torch.Tensor
    layers: tuple[DeviceLayer, ...]
    final_norm: torch.Tensor
    head: torch.Tensor


def to_device(weights: Weights, config: ModelConfig, device: torch.device, precision: str) -> DeviceWeights:
    """Copy a model; the one place that knows how the CPU packs its matrices. Raises NoSpace."""
    dtype = _DTYPES[precision]
    try:
        embed = weights.embed.to(device, dtype)
        return DeviceWeights(
            dtype=dtype,
            embed=embed,
            layers=tuple(_layer(layer, config, device, dtype) for layer in weights.layers),
            final_norm=weights.final_norm.to(device),
            head=embed.t() if config.tied else weights.head.rows().to(device, dtype).t(),
        )
    except torch.OutOfMemoryError as error:
        raise NoSpace(f"the device has no memory for the model's weights in {precision}") from error


def _layer(layer: LayerWeights, config: ModelConfig, device: torch.device, dtype: torch.dtype) -> DeviceLayer:
    norms = None
    if layer.q_norm is not None and layer.k_norm is not None:
        norms = (layer.q_norm.to(device), layer.k_norm.to(device))
    return DeviceLayer(
        attn_norm=layer.attn_norm.to(device),
        qkv=layer.qkv.rows().to(device, dtype).t(),
        qkv_bias=None if layer.qkv_bias is None else layer.qkv_bias.to(device, dtype),
        head_norms=norms,
        o=layer.o.rows().to(device, dtype).t(),
        mlp_norm=layer.mlp_norm.to(device),
        gate_up=_gate_above_up(layer.gate_up.rows(), config).to(device, dtype).t(),
        down=layer.down.rows().to(device, dtype).t(),
    )


def _gate_above_up(interleaved: torch.Tensor, config: ModelConfig) -> torch.Tensor:
    gate, up = interleaved.view(-1, 2, _PAIR, config.hidden).unbind(1)
    return torch.cat([part.flatten(0, 1)[: config.intermediate] for part in (gate, up)])
