"""Layers for sequences whose first keys and values are in other workers' memory."""

from __future__ import annotations

import torch

from covey.errors import InvalidArgument

from .batch import Batch
from .config import ModelConfig
from .layers import TorchLayers
from .partial import Part, attend, attend_blocks, merge
from .plan import Floats
from .pool import KvPool


class LongLayers(TorchLayers):
    """Torch layers over one row at a time: attention here and elsewhere, merged by log-sum-exp."""

    name = "long"

    def _attend(self, qkv: torch.Tensor, batch: Batch, layer: int) -> torch.Tensor:
        (row,) = batch.rows
        config, size = self._config, self._pool.geometry.block_size
        q, k, v = torch.split(qkv, [config.n_heads, config.n_kv_heads, config.n_kv_heads], dim=1)
        local = torch.from_numpy(batch.positions).long() - row.base
        table = torch.from_numpy(batch.table(0)).long()
        self._pool.write(layer, table[local // size], local % size, k, v)
        keys, values = self._pool.read(layer, table)
        end = int(local[-1]) + 1
        parts = [attend(q, keys[:, :end], values[:, :end], start=int(local[0]))]
        if row.elsewhere is not None:
            found = row.elsewhere.attend(layer, q.contiguous().numpy())
            parts += [Part(out=torch.from_numpy(out), lse=torch.from_numpy(lse)) for out, lse in found]
        return merge(parts).out.flatten(1)


def attend_for(
    pool: KvPool, config: ModelConfig, layer: int, blocks: tuple[int, ...], q: Floats
) -> tuple[Floats, Floats]:
    """See `plan.ShardRunner.attend`."""
    if not 0 <= layer < config.n_layers:
        raise InvalidArgument(f"the model has {config.n_layers} layers", field="layer")
    if q.ndim != 3 or q.shape[1:] != (config.n_heads, config.head_dim):
        raise InvalidArgument(f"queries are [token, {config.n_heads}, {config.head_dim}]", field="q")
    part = attend_blocks(pool, layer, blocks, torch.from_numpy(q))
    return part.out.numpy(), part.lse.numpy()
