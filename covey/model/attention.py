"""Attention over the paged pool on a CPU: batched for single tokens, per sequence for chunks."""

from __future__ import annotations

import torch
from torch.nn.functional import scaled_dot_product_attention

from .batch import Batch, Chunk, DecodeGroup
from .layers import Scratch
from .pool import KvPool


class PagedAttention:
    """Writes the new keys and values of each layer of one step and attends over them; `heads` is the number of query
    heads.

    Grouped queries: the queries that share a kv head are the rows of one product, so keys are never repeated.
    """

    def __init__(self, pool: KvPool, heads: int, scratch: Scratch) -> None:
        self._pool = pool
        self._geometry = pool.geometry
        self._group = heads // pool.geometry.kv_heads
        self._heads = heads
        self._scale = pool.geometry.head_dim**-0.5
        self._scratch = scratch

    def run(self, qkv: torch.Tensor, batch: Batch, layer: int, out: torch.Tensor) -> None:
        """Attend with rotated, fused `qkv` [token, (q, k, v) heads * head_dim]; fills `out` [token, heads *
        head_dim].
        """
        width = self._heads * self._geometry.head_dim
        page = layer * self._geometry.pages_per_layer
        new = qkv[:, width:].reshape(-1, self._geometry.head_dim)
        self._pool.slots.index_copy_(0, batch.slots + page * self._geometry.block_size, new)
        for group in batch.groups:
            rows = slice(group.first, group.first + group.n_rows)
            self._decode(qkv[rows, :width], group, page, out[rows])
        for chunk in batch.chunks:
            rows = slice(chunk.first, chunk.first + chunk.length)
            self._chunk(qkv[rows], chunk, page, out[rows])

    def _gather(self, pages: torch.Tensor, page: int, n_rows: int, n_blocks: int) -> torch.Tensor:
        """Keys and values [2, row * kv head, position, head_dim] of a layer, copied out of the pool."""
        geometry = self._geometry
        found = self._scratch.take("gather", pages.shape[0], geometry.block_size * geometry.head_dim)
        torch.index_select(self._pool.pages, 0, pages + page, out=found)
        return found.view(2, n_rows * geometry.kv_heads, n_blocks * geometry.block_size, geometry.head_dim)

    def _decode(self, q: torch.Tensor, group: DecodeGroup, page: int, out: torch.Tensor) -> None:
        keys, values = self._gather(group.pages, page, group.n_rows, group.n_blocks)
        shape = (group.n_rows * self._geometry.kv_heads, self._group, self._geometry.head_dim)
        scores = torch.baddbmm(group.mask, q.reshape(shape), keys.transpose(1, 2), alpha=self._scale)
        torch.bmm(torch.softmax(scores, dim=-1), values, out=out.view(shape))

    def _chunk(self, qkv: torch.Tensor, chunk: Chunk, page: int, out: torch.Tensor) -> None:
        geometry = self._geometry
        heads = qkv.view(1, chunk.length, -1, geometry.head_dim).transpose(1, 2)
        q, target = heads[:, : self._heads], out.view(chunk.length, self._heads, geometry.head_dim)
        if chunk.pages is None:
            keys, values = heads[:, self._heads :].chunk(2, dim=1)
            attended = scaled_dot_product_attention(q, keys, values, is_causal=True, enable_gqa=True)
            target.copy_(attended[0].transpose(0, 1))
            return
        keys, values = self._gather(chunk.pages, page, 1, chunk.n_blocks)
        for tile in chunk.tiles:
            attended = scaled_dot_product_attention(
                q[:, :, tile.first : tile.last],
                keys[None, :, : tile.context],
                values[None, :, : tile.context],
                attn_mask=tile.mask,
                enable_gqa=True,
            )
            target[tile.first : tile.last].copy_(attended[0].transpose(0, 1))
