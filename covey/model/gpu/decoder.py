"""The forward pass of a Llama-family decoder out of kernels and torch products."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn.functional import silu

from covey.model.config import ModelConfig
from covey.model.rotary import inverse_frequencies

from .batch import GpuBatch
from .kernels.decode_attention import decode_attention
from .kernels.norm import add_rms_norm
from .kernels.prefill_attention import prefill_attention
from .kernels.rotary import rotate_heads
from .kernels.scatter import scatter
from .pages import DevicePool
from .weights import DeviceWeights


@dataclass(frozen=True, slots=True, kw_only=True)
class Stream:
    """The residual stream between two layers: `hidden` in fp32 and what is still to be added to it, row by row."""

    hidden: torch.Tensor
    delta: torch.Tensor | None = None

    def settled(self) -> torch.Tensor:
        """The sum."""
        return self.hidden if self.delta is None else self.hidden + self.delta


class GpuDecoder:
    """Weights and pool. Nothing in here waits for the device or depends on values there, so a pass can be captured."""

    def __init__(self, config: ModelConfig, weights: DeviceWeights, pool: DevicePool) -> None:
        self._config = config
        self._weights = weights
        self._pool = pool
        self._frequencies = inverse_frequencies(config).to(weights.embed.device)

    def embed(self, tokens: torch.Tensor) -> torch.Tensor:
        """The first layer's input [token, hidden] in fp32."""
        return self._weights.embed.index_select(0, tokens).float()

    def phases(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines [token, head_dim / 2] of the rotary angles."""
        angles = torch.outer(positions.float(), self._frequencies)
        return angles.cos(), angles.sin()

    def layer(self, index: int, stream: Stream, batch: GpuBatch, phases: tuple[torch.Tensor, torch.Tensor]) -> Stream:
        """Run one layer: fill its pages and go on with the stream."""
        return self._feed_forward(index, stream.hidden, self._attend(index, stream, batch, phases))

    def last_layer(
        self, stream: Stream, batch: GpuBatch, phases: tuple[torch.Tensor, torch.Tensor], keep: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Run the last layer, after its pages only with the rows `keep`: their logits [kept, vocab] in fp32, and for
        every token whether it is made of finite numbers.
        """
        index = self._config.n_layers - 1
        attended = self._attend(index, stream, batch, phases)
        is_finite = torch.isfinite(stream.hidden).all(dim=1) & torch.isfinite(attended).all(dim=1)
        hidden = stream.hidden.index_select(0, keep)
        return self._logits(self._feed_forward(index, hidden, attended.index_select(0, keep))), is_finite

    def decode(self, batch: GpuBatch) -> torch.Tensor:
        """Logits of a batch through all layers, a row a token."""
        stream, phases = Stream(hidden=self.embed(batch.tokens)), self.phases(batch.positions)
        for index in range(self._config.n_layers):
            stream = self.layer(index, stream, batch, phases)
        return self._logits(stream)

    def _attend(
        self, index: int, stream: Stream, batch: GpuBatch, phases: tuple[torch.Tensor, torch.Tensor]
    ) -> torch.Tensor:
        """Add what the stream lacks, fill the layer's pages, and return what its heads found [token, heads * dim]."""
        config, layer, dtype = self._config, self._weights.layers[index], self._weights.dtype
        qkv = torch.mm(add_rms_norm(stream.hidden, stream.delta, layer.attn_norm, config.rms_eps, dtype), layer.qkv)
        if layer.qkv_bias is not None:
            qkv.add_(layer.qkv_bias)
        rotate_heads(qkv, *phases, config.n_heads, config.n_kv_heads, layer.head_norms, config.rms_eps)
        scatter(qkv[:, config.n_heads * config.head_dim :], batch.slots, self._pool, index)
        out = torch.empty(len(qkv), config.n_heads, config.head_dim, dtype=qkv.dtype, device=qkv.device)
        if batch.n_singles:
            single = out[: batch.n_singles]
            decode_attention(qkv, self._pool, index, batch.tables, batch.contexts, single, batch.n_splits)
        if batch.chunks is not None:
            prefill_attention(qkv, self._pool, index, batch.chunks, out)
        return out.view(len(qkv), -1)

    def _feed_forward(self, index: int, hidden: torch.Tensor, attended: torch.Tensor) -> Stream:
        layer, dtype = self._weights.layers[index], self._weights.dtype
        found = torch.mm(attended, layer.o)
        normed = add_rms_norm(hidden, found, layer.mlp_norm, self._config.rms_eps, dtype)
        gate, up = torch.mm(normed, layer.gate_up).chunk(2, dim=1)
        return Stream(hidden=hidden, delta=torch.mm(silu(gate).mul_(up), layer.down))

    def _logits(self, stream: Stream) -> torch.Tensor:
        weights = self._weights
        final = add_rms_norm(stream.hidden, stream.delta, weights.final_norm, self._config.rms_eps, weights.dtype)
        return torch.mm(final, weights.head).float()
