"""The layers of a decoder in torch: the reference of the native kernels, and what runs where those are not built."""

from __future__ import annotations

import torch
from torch.nn import functional

from .batch import Batch
from .config import ModelConfig
from .matrix import product
from .pool import KvPool
from .rotary import rotate
from .weights import LayerWeights, Weights, separate


class TorchLayers:
    """`decoder.Layers` in plain torch operations; correct first, and fast enough for what it is."""

    name = "torch"

    def __init__(self, config: ModelConfig, weights: Weights, pool: KvPool) -> None:
        self._config = config
        self._weights = weights
        self._pool = pool

    def forward(self, hidden: torch.Tensor, phases: torch.Tensor, batch: Batch, first: int, last: int) -> None:
        """See `decoder.Layers.forward`."""
        for index in range(first, last):
            layer = self._weights.layers[index]
            qkv = self._project(hidden, layer, phases)
            hidden += product(self._attend(qkv, batch, index), layer.o)
            gate_up = product(self._norm(hidden, layer.mlp_norm), layer.gate_up)
            gate, up = separate(gate_up, self._config.intermediate, dim=1)
            hidden += product(functional.silu(gate) * up, layer.down)

    def head(self, hidden: torch.Tensor) -> torch.Tensor:
        """See `decoder.Layers.head`."""
        return product(self._norm(hidden, self._weights.final_norm), self._weights.head)

    def _norm(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return functional.rms_norm(x, weight.shape, weight, self._config.rms_eps)

    def _project(self, hidden: torch.Tensor, layer: LayerWeights, phases: torch.Tensor) -> torch.Tensor:
        config = self._config
        qkv = product(self._norm(hidden, layer.attn_norm), layer.qkv)
        if layer.qkv_bias is not None:
            qkv = qkv + layer.qkv_bias
        heads = qkv.reshape(hidden.shape[0], -1, config.head_dim)
        q, k, v = torch.split(heads, [config.n_heads, config.n_kv_heads, config.n_kv_heads], dim=1)
        if layer.q_norm is not None and layer.k_norm is not None:
            q, k = self._norm(q, layer.q_norm), self._norm(k, layer.k_norm)
        return torch.cat([rotate(q, phases), rotate(k, phases), v], dim=1)

    def _attend(self, qkv: torch.Tensor, batch: Batch, layer: int) -> torch.Tensor:
        config, size = self._config, self._pool.geometry.block_size
        q, k, v = torch.split(qkv, [config.n_heads, config.n_kv_heads, config.n_kv_heads], dim=1)
        positions = torch.from_numpy(batch.positions).long()
        tables = torch.from_numpy(batch.tables).long()
        table_first = torch.from_numpy(batch.table_first).long()[torch.from_numpy(batch.row_of).long()]
        self._pool.write(layer, tables[table_first + positions // size], positions % size, k, v)
        out = torch.empty_like(q)
        for index in range(len(batch.rows)):
            span = batch.span(index)
            keys, values = self._pool.read(layer, torch.from_numpy(batch.table(index)).long())
            out[span] = self._attend_row(q[span], keys, values, int(batch.start[index]))
        return out.flatten(1)

    @staticmethod
    def _attend_row(q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, start: int) -> torch.Tensor:
        end = start + q.shape[0]
        visible = torch.ones(q.shape[0], end, dtype=torch.bool).tril_(start)
        found = functional.scaled_dot_product_attention(
            q.transpose(0, 1)[None], keys[None, :, :end], values[None, :, :end], attn_mask=visible, enable_gqa=True
        )
        return found[0].transpose(0, 1)
