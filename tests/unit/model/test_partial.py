"""Attention over shards, merged by log-sum-exp, is attention over all keys: any split, any order, empty shards too."""

from __future__ import annotations

import math
from random import Random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from covey.model.partial import Part, attend, attend_blocks, merge
from covey.model.pool import Geometry, KvPool

EXACT = 4e-6
"""Some thirty roundings of fp32: what scores of this size cost with or without shards."""


def whole(q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, start: int | None) -> torch.Tensor:
    """The reference, in double precision."""
    group = q.shape[1] // keys.shape[0]
    k, v = keys.double().repeat_interleave(group, 0), values.double().repeat_interleave(group, 0)
    scores = q.double().transpose(0, 1) @ k.transpose(1, 2) / math.sqrt(q.shape[2])
    if start is not None:
        visible = torch.ones(q.shape[0], keys.shape[1], dtype=torch.bool).tril_(start)
        scores = scores.masked_fill(~visible, float("-inf"))
    return (scores.softmax(-1) @ v).transpose(0, 1)


def made(
    seed: int, tokens: int, heads: int, kv_heads: int, width: int, count: int, scale: float = 1.0
) -> tuple[torch.Tensor, ...]:
    rng = torch.Generator().manual_seed(seed)
    return (
        torch.randn(tokens, heads, width, generator=rng) * scale,
        torch.randn(kv_heads, count, width, generator=rng),
        torch.randn(kv_heads, count, width, generator=rng),
    )


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected).abs().max() / expected.abs().max())


@given(
    seed=st.integers(0, 10**6),
    tokens=st.integers(1, 5),
    grouping=st.sampled_from([(1, 1), (4, 4), (9, 3), (8, 2), (6, 1)]),
    width=st.sampled_from([8, 64]),
    lengths=st.lists(st.integers(0, 70), min_size=1, max_size=7).filter(lambda found: sum(found) > 0),
    scale=st.sampled_from([0.1, 1.0, 2.0]),
)
@settings(max_examples=60, deadline=None)
def test_shards_merged_in_any_order_are_the_whole(
    seed: int, tokens: int, grouping: tuple[int, int], width: int, lengths: list[int], scale: float
) -> None:
    heads, kv_heads = grouping
    q, keys, values = made(seed, tokens, heads, kv_heads, width, sum(lengths), scale)
    parts, at = [], 0
    for length in lengths:
        parts.append(attend(q, keys[:, at : at + length], values[:, at : at + length]))
        at += length
    expected = whole(q, keys, values, None)
    assert relative(merge(parts).out, expected) <= EXACT
    Random(seed).shuffle(parts)
    folded = parts[0]
    for part in parts[1:]:
        folded = merge((folded, part))
    assert relative(folded.out, expected) <= EXACT, "the rule is associative and commutative"
    assert torch.allclose(folded.lse, merge(parts).lse, rtol=1e-6, atol=1e-5)


@given(seed=st.integers(0, 10**6), tokens=st.integers(1, 9), before=st.integers(0, 60), cut=st.integers(0, 60))
@settings(max_examples=40, deadline=None)
def test_a_chunk_attends_to_a_shard_elsewhere_and_causally_to_its_own(
    seed: int, tokens: int, before: int, cut: int
) -> None:
    cut = min(cut, before)
    q, keys, values = made(seed, tokens, 9, 3, 64, before + tokens)
    elsewhere = attend(q, keys[:, :cut], values[:, :cut])
    here = attend(q, keys[:, cut:], values[:, cut:], start=before - cut)
    assert relative(merge((elsewhere, here)).out, whole(q, keys, values, before)) <= EXACT


def test_shards_without_keys() -> None:
    q, keys, values = made(1, 2, 4, 2, 8, 5)
    empty = attend(q, keys[:, :0], values[:, :0])
    assert torch.equal(empty.out, torch.zeros_like(q))
    assert torch.isinf(empty.lse).all()
    nothing = merge((empty, empty))
    assert torch.equal(nothing.out, torch.zeros_like(q))
    assert (nothing.lse == float("-inf")).all()
    full = attend(q, keys, values)
    for parts in ((full, empty), (empty, full), (empty, full, empty)):
        found: Part = merge(parts)
        assert torch.equal(found.out, full.out)
        assert torch.allclose(found.lse, full.lse)
    with pytest.raises(ValueError, match="nothing"):
        merge(())


@pytest.mark.parametrize(("kv_dtype", "bound"), [("fp32", 1e-6), ("fp16", 2e-3), ("int8", 2e-2)])
def test_blocks_of_a_pool(kv_dtype: str, bound: float) -> None:
    pool = KvPool(Geometry(n_layers=2, kv_heads=3, head_dim=64, block_size=8, kv_dtype=kv_dtype), 6)  # type: ignore[arg-type]
    q, keys, values = made(3, 1, 9, 3, 64, 32)
    table = (4, 1, 5, 2)
    positions = torch.arange(32)
    pool.write(1, torch.tensor(table)[positions // 8], positions % 8, keys.transpose(0, 1), values.transpose(0, 1))
    found = merge(
        (attend_blocks(pool, 1, table[:3], q), attend_blocks(pool, 1, (), q), attend_blocks(pool, 1, table[3:], q))
    )
    assert relative(found.out, whole(q, keys, values, None)) <= bound
