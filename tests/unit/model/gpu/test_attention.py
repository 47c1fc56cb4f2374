"""Paged attention for decode and prefill, and the merge of shards: kernels against their torch references."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from covey.model.gpu.kernels.decode_attention import decode_attention, decode_attention_reference
from covey.model.gpu.kernels.merge import merge, merge_reference, merge_shards
from covey.model.gpu.kernels.prefill_attention import (
    TILE_QUERIES,
    Chunks,
    prefill_attention,
    prefill_attention_reference,
)
from covey.model.pool import KvDtype

from .pools import ALL_KV_DTYPES, filled_pool, layout, source

CLOSE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 2e-2}
"""Largest difference of an output of about unit size, by the type of the queries; over fp16 or int8 pages the products
of 16-bit queries run in fp16.
"""
SPLIT = 32


def chunks_of(parts: list[tuple[int, int]], tables: torch.Tensor) -> Chunks:
    """Chunks (start, length) laid one after the other."""
    starts, lengths = (torch.tensor(x, dtype=torch.int32) for x in zip(*parts, strict=True))
    tiles = [(i, first) for i, (_, length) in enumerate(parts) for first in range(0, length, TILE_QUERIES)]
    return Chunks(
        firsts=torch.cumsum(lengths, dim=0, dtype=torch.int32) - lengths,
        lengths=lengths,
        starts=starts,
        tables=tables,
        tiles=torch.tensor(tiles, dtype=torch.int32),
    )


@pytest.mark.parametrize("kv_dtype", ALL_KV_DTYPES)
@pytest.mark.parametrize("dtype", CLOSE)
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim", "block_size"), [(4, 2, 16, 8), (3, 1, 24, 16)])
def test_decode_equals_the_reference(
    dtype: torch.dtype, kv_dtype: KvDtype, heads: int, kv_heads: int, head_dim: int, block_size: int
) -> None:
    pages = layout(kv_dtype, block_size=block_size, head_dim=head_dim, kv_heads=kv_heads)
    contexts = [1, 0, 32, 33, 75]
    pool, tables = filled_pool(pages, contexts, 1, seed=5)
    qkv = torch.randn(5, (heads + 2 * kv_heads) * head_dim, generator=source(1)).to(dtype)
    found, expected = (torch.full((5, heads, head_dim), torch.nan, dtype=dtype) for _ in range(2))
    lengths = torch.tensor(contexts, dtype=torch.int32)
    decode_attention(qkv, pool, 1, tables, lengths, found, 3, SPLIT)
    decode_attention_reference(qkv, pool, 1, tables, lengths, expected, 3, SPLIT)
    torch.testing.assert_close(found, expected, rtol=0, atol=CLOSE[dtype])
    assert torch.all(found[1] == 0.0)


def test_a_row_has_the_same_bits_in_any_batch() -> None:
    pages = layout("int8")
    contexts = [40, 3, 97]
    pool, tables = filled_pool(pages, contexts, 0, seed=2)
    q = torch.randn(3, 64, generator=source(4))
    lengths = torch.tensor(contexts, dtype=torch.int32)
    together, alone = torch.empty(3, 4, 16), torch.empty(1, 4, 16)
    decode_attention(q, pool, 0, tables, lengths, together, 4, SPLIT)
    decode_attention(q[:1], pool, 0, tables[:1], lengths[:1], alone, 2, SPLIT)
    assert torch.equal(together[:1], alone)


@pytest.mark.parametrize("kv_dtype", ALL_KV_DTYPES)
@pytest.mark.parametrize("dtype", CLOSE)
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim", "block_size"), [(4, 2, 16, 8), (3, 1, 24, 16)])
def test_prefill_equals_the_reference(
    dtype: torch.dtype, kv_dtype: KvDtype, heads: int, kv_heads: int, head_dim: int, block_size: int
) -> None:
    parts = [(0, 1), (0, 35), (30, 9), (70, 2)]
    pages = layout(kv_dtype, block_size=block_size, head_dim=head_dim, kv_heads=kv_heads)
    pool, tables = filled_pool(pages, [start + length for start, length in parts], 1, seed=9)
    qkv = torch.randn(47, (heads + 2 * kv_heads) * head_dim, generator=source(8)).to(dtype)
    found, expected = (torch.full((47, heads, head_dim), torch.nan, dtype=dtype) for _ in range(2))
    prefill_attention(qkv, pool, 1, chunks_of(parts, tables), found)
    prefill_attention_reference(qkv, pool, 1, chunks_of(parts, tables), expected)
    torch.testing.assert_close(found, expected, rtol=0, atol=CLOSE[dtype])


def test_chunks_have_the_bits_of_one_prefill() -> None:
    pool, tables = filled_pool(layout("fp16"), [70], 0, seed=3)
    q = torch.randn(70, 64, generator=source(6))
    whole, pieces = torch.empty(70, 4, 16), torch.empty(70, 4, 16)
    prefill_attention(q, pool, 0, chunks_of([(0, 70)], tables), whole)
    for first, last in ((0, 13), (13, 14), (14, 70)):
        prefill_attention(q[first:last], pool, 0, chunks_of([(first, last - first)], tables), pieces[first:last])
    assert torch.equal(pieces, whole)


@settings(max_examples=5, derandomize=True)
@given(
    st.sampled_from(ALL_KV_DTYPES),
    st.sampled_from((4, 8, 20)),
    st.lists(st.tuples(st.integers(0, 60), st.integers(1, 20)), min_size=1, max_size=3),
)
def test_any_raggedness(kv_dtype: KvDtype, block_size: int, parts: list[tuple[int, int]]) -> None:
    """Chunks anywhere, and their last tokens once more as decode rows, over pages that hold NaN elsewhere."""
    pages = layout(kv_dtype, block_size=block_size, kv_heads=1, n_layers=1)
    contexts = [start + length for start, length in parts]
    pool, tables = filled_pool(pages, contexts, 0, seed=1)
    total = sum(length for _, length in parts)
    q = torch.randn(total, 32, generator=source(total))
    found, expected = torch.empty(total, 2, 16), torch.empty(total, 2, 16)
    chunks = chunks_of(parts, tables)
    prefill_attention(q, pool, 0, chunks, found)
    prefill_attention_reference(q, pool, 0, chunks, expected)
    torch.testing.assert_close(found, expected, rtol=0, atol=CLOSE[torch.float32])
    last = (chunks.firsts + chunks.lengths - 1).long()
    single = torch.empty(len(parts), 2, 16)
    decode_attention(q[last], pool, 0, tables, torch.tensor(contexts, dtype=torch.int32), single, 3, SPLIT)
    torch.testing.assert_close(single, expected[last], rtol=0, atol=CLOSE[torch.float32])


@pytest.mark.parametrize("dtype", CLOSE)
@pytest.mark.parametrize("shards", [1, 2, 5])
def test_merging_equals_the_reference(dtype: torch.dtype, shards: int) -> None:
    partial = torch.randn(shards, 6, 24, generator=source(shards)).to(dtype)
    lses = torch.randn(shards, 6, generator=source(7)) * 20
    lses[0, 1] = lses[-1, 2] = -torch.inf
    lses[:, 3] = -torch.inf
    found, expected = torch.empty(6, 24, dtype=dtype), torch.empty(6, 24, dtype=dtype)
    lse, expected_lse = torch.empty(6), torch.empty(6)
    merge(partial, lses, found, lse)
    merge_reference(partial, lses, expected, expected_lse)
    torch.testing.assert_close(found, expected, rtol=0, atol=CLOSE[dtype])
    torch.testing.assert_close(lse, expected_lse, rtol=0, atol=1e-5)
    assert torch.all(found[3] == 0.0)
    assert lse[3] == -torch.inf


@settings(max_examples=40, derandomize=True)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=6), st.integers(0, 1000))
def test_shards_merge_to_attention_over_all_keys_in_any_grouping(sizes: list[int], seed: int) -> None:
    """DistAttention: shards of any size, empty ones too, merged at once, in order, or from the back."""
    keys, values = (torch.randn(sum(sizes), 8, generator=source(seed + i), dtype=torch.float64) for i in (0, 1))
    q = torch.randn(3, 8, generator=source(seed + 2), dtype=torch.float64) * 4
    outputs, lses = [], []
    for k, v in zip(torch.split(keys, sizes), torch.split(values, sizes), strict=True):
        scores = q @ k.T
        lses.append(scores.logsumexp(dim=1) if len(k) else torch.full((3,), -torch.inf, dtype=torch.float64))
        outputs.append(scores.softmax(dim=1) @ v)
    parts: list[tuple[torch.Tensor, ...]] = list(zip(outputs, lses, strict=True))

    def join(a: tuple[torch.Tensor, ...], b: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        return merge_shards(torch.stack((a[0], b[0])), torch.stack((a[1], b[1])))

    forward, backward = parts[0], parts[-1]
    for part in parts[1:]:
        forward = join(forward, part)
    for part in parts[-2::-1]:
        backward = join(part, backward)
    at_once = merge_shards(torch.stack(outputs), torch.stack(lses))
    expected = (q @ keys.T).softmax(dim=1) @ values
    for merged, lse in (forward, backward, at_once):
        torch.testing.assert_close(merged, expected, rtol=0, atol=1e-12)
        if sum(sizes):
            torch.testing.assert_close(lse, (q @ keys.T).logsumexp(dim=1), rtol=0, atol=1e-12)
        else:
            assert torch.all(lse == -torch.inf)
