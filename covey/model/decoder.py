"""The forward pass of a Llama-family decoder over one ragged batch."""

from __future__ import annotations

import torch

from .attention import PagedAttention
from .batch import Batch
from .config import ModelConfig
from .layers import Scratch, add_product, gated, inverse_frequencies, product, rms_norm, rotary_phases, rotate
from .pool import KvPool
from .weights import LayerWeights, Weights


class Decoder:
    """Weights, pool and scratch memory; `forward` is the only operation."""

    def __init__(self, config: ModelConfig, weights: Weights, pool: KvPool) -> None:
        self._config = config
        self._weights = weights
        self._scratch = Scratch()
        self._attention = PagedAttention(pool, config.n_heads, self._scratch)
        self._frequencies = inverse_frequencies(config)

    def forward(self, batch: Batch) -> torch.Tensor:
        """Fill the pool for every token and return logits [sampled row, vocab]; valid until the next call."""
        config, weights = self._config, self._weights
        hidden = weights.embed.index_select(0, batch.tokens)
        phases = rotary_phases(batch.positions, self._frequencies)
        attended = self._scratch.take("attended", hidden.shape[0], config.n_heads * config.head_dim)
        last = len(weights.layers) - 1
        for index, layer in enumerate(weights.layers):
            self._attention.run(self._project(hidden, layer, phases), batch, index, attended)
            if index == last:
                # From here on only the sampled tokens matter: all keys and values are written.
                if not batch.samples:
                    return hidden.new_empty(0, config.vocab_size)
                hidden = hidden.index_select(0, batch.sample_rows)
                attended = attended.index_select(0, batch.sample_rows)
            add_product(hidden, attended, layer.o)
            self._feed_forward(hidden, layer)
        final = rms_norm(hidden, weights.final_norm, config.rms_eps)
        logits = self._scratch.take("logits", final.shape[0], config.vocab_size)
        product(final, weights.lm_head, logits)
        return logits

    def _project(self, hidden: torch.Tensor, layer: LayerWeights, phases: torch.Tensor) -> torch.Tensor:
        config = self._config
        qkv = self._scratch.take("qkv", hidden.shape[0], layer.qkv.shape[0])
        product(rms_norm(hidden, layer.attn_norm, config.rms_eps), layer.qkv, qkv)
        if layer.qkv_bias is not None:
            qkv.add_(layer.qkv_bias)
        heads = qkv.view(hidden.shape[0], -1, config.head_dim)
        turning = heads[:, : config.n_heads + config.n_kv_heads]
        if layer.q_norm is not None and layer.k_norm is not None:
            q, k = turning[:, : config.n_heads], turning[:, config.n_heads :]
            q.copy_(rms_norm(q, layer.q_norm, config.rms_eps))
            k.copy_(rms_norm(k, layer.k_norm, config.rms_eps))
        rotate(turning, phases)
        return qkv

    def _feed_forward(self, hidden: torch.Tensor, layer: LayerWeights) -> None:
        gate_up = self._scratch.take("gate_up", hidden.shape[0], layer.gate_up.shape[0])
        product(rms_norm(hidden, layer.mlp_norm, self._config.rms_eps), layer.gate_up, gate_up)
        add_product(hidden, gated(gate_up), layer.down)
