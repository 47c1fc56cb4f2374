"""Which codec a tier keeps blocks in, and which blocks stay exact."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from covey.policy.codecs import TierCodecs, can_recode, settled
from covey.types.block import BlockCodec, KvElement
from covey.types.ids import BlockHash, TenantId
from covey.types.kv_state import Tier

KNOWN = frozenset({BlockCodec.FP16, BlockCodec.INT8})
A, B = TenantId("a"), TenantId("b")


def name(i: int) -> BlockHash:
    return BlockHash(i.to_bytes(16, "little"))


def test_a_tier_that_is_not_named_keeps_blocks_as_they_came() -> None:
    policy = TierCodecs(tiers={Tier.DISK: BlockCodec.INT8}, tenants={B: BlockCodec.FP16})
    assert policy.choose(Tier.DISK, A, KvElement.FP32, KNOWN) is BlockCodec.INT8
    assert policy.choose(Tier.DISK, B, KvElement.FP32, KNOWN) is BlockCodec.FP16
    assert policy.choose(Tier.MEMORY, B, KvElement.FP32, KNOWN) is BlockCodec.RAW


def test_a_tenant_may_be_exempt() -> None:
    policy = TierCodecs(tiers={Tier.DISK: BlockCodec.INT8}, tenants={B: BlockCodec.RAW})
    assert policy.choose(Tier.DISK, B, KvElement.FP32, KNOWN) is BlockCodec.RAW


@pytest.mark.parametrize(
    ("codec", "element"),
    [(BlockCodec.FP16, KvElement.FP16), (BlockCodec.INT8, KvElement.INT8), (BlockCodec.INT8, KvElement.OPAQUE),
     (BlockCodec.PQ4, KvElement.FP32), (BlockCodec.XQUANT, KvElement.FP32)],
)  # fmt: skip
def test_what_saves_nothing_or_is_not_here_is_not_chosen(codec: BlockCodec, element: KvElement) -> None:
    assert TierCodecs(tiers={Tier.DISK: codec}).choose(Tier.DISK, A, element, KNOWN) is BlockCodec.RAW


def test_blocks_only_become_smaller() -> None:
    order = [BlockCodec.RAW, BlockCodec.FP16, BlockCodec.INT8, BlockCodec.PQ4]
    for i, present in enumerate(order):
        for j, wanted in enumerate(order):
            assert can_recode(present, wanted, KvElement.FP32) == (i < j)


@given(st.lists(st.integers(0, 30), max_size=30), st.integers(0, 5))
def test_a_block_is_settled_when_enough_others_grow_from_it(choices: list[int], recent: int) -> None:
    parents = [-1 if choice >= i else choice for i, choice in enumerate(choices)]
    heights = [0] * len(parents)
    for i in reversed(range(len(parents))):
        if parents[i] >= 0:
            heights[parents[i]] = max(heights[parents[i]], heights[i] + 1)
    links = [(name(i), name(p) if p >= 0 else BlockHash(b"")) for i, p in enumerate(parents)]
    assert settled(links, recent) == {name(i) for i, height in enumerate(heights) if height >= recent}
