"""Pools with random content, and block tables into them."""

from __future__ import annotations

import torch

from covey.model.gpu.kernels.scatter import scatter_reference
from covey.model.gpu.pages import DevicePool
from covey.model.pool import Geometry, KvDtype

CPU = torch.device("cpu")
ALL_KV_DTYPES: tuple[KvDtype, ...] = ("fp32", "fp16", "int8")


def layout(
    kv_dtype: KvDtype = "fp32", *, block_size: int = 8, head_dim: int = 16, kv_heads: int = 2, n_layers: int = 2
) -> Geometry:
    return Geometry(n_layers=n_layers, kv_heads=kv_heads, head_dim=head_dim, block_size=block_size, kv_dtype=kv_dtype)


def source(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def scattered_tables(contexts: list[int], block_size: int, n_blocks: int, seed: int) -> torch.Tensor:
    """Block tables [row, blocks] of int32 for contexts, of blocks in random order that no two rows share."""
    counts = [-(-context // block_size) for context in contexts]
    order = torch.randperm(n_blocks, generator=source(seed)).tolist()
    tables = torch.zeros(len(contexts), max(*counts, 1), dtype=torch.int32)
    for row, count in enumerate(counts):
        tables[row, :count] = torch.tensor([order.pop() for _ in range(count)])
    return tables


def filled_pool(pages: Geometry, contexts: list[int], layer: int, seed: int) -> tuple[DevicePool, torch.Tensor]:
    """A pool whose rows of `contexts` hold random keys and values in `layer`, everything else being NaN; the tables."""
    n_blocks = sum(-(-context // pages.block_size) for context in contexts) + 3
    pool = DevicePool(pages, n_blocks, CPU)
    if pages.kv_dtype == "int8":
        pool.scales.fill_(torch.nan)
    else:
        pool.numbers.fill_(torch.nan)
    tables = scattered_tables(contexts, pages.block_size, n_blocks, seed)
    for context, table in zip(contexts, tables, strict=True):
        positions = torch.arange(context)
        slots = table[positions // pages.block_size].long() * pages.block_size + positions % pages.block_size
        kv = torch.randn(context, 2 * pages.kv_heads * pages.head_dim, generator=source(seed + context))
        scatter_reference(kv, slots, pool, layer)
    return pool, tables
