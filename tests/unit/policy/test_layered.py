"""Layered prefill: groups of layers, one batch in flight, decoding at every step."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from covey.policy.batch_limits import BatchLimits
from covey.policy.batch_policies import make_batcher
from covey.policy.batching import Batcher
from covey.policy.layered import bounds_of, groups_for
from covey.policy.ledger import Demand


def policy_with(*lengths: int, n_layers: int = 8) -> Batcher:
    policy = make_batcher(BatchLimits(batching="layered", chunk_min=64), n_layers=n_layers)
    for seq, length in enumerate(lengths):
        enter(policy, seq, length)
    return policy


def enter(policy: Batcher, seq: int, length: int, *, computed: int = 0) -> None:
    policy.submit(seq, Demand(tokens=length))
    policy.admit(lambda _seq: True, 0.0)
    policy.start(seq, computed=computed, known=length)


@pytest.mark.parametrize(
    ("tokens", "groups"), [(1, 1), (512, 1), (513, 2), (1024, 2), (2048, 4), (2049, 8), (4096, 8), (4097, 16)]
)
def test_groups_by_prompt_length_are_the_published_ones(tokens: int, groups: int) -> None:
    assert groups_for(tokens, 512, 32) == groups


@given(n_layers=st.integers(1, 80), share=st.floats(0.01, 1))
def test_groups_of_layers_cover_all_and_are_even(n_layers: int, share: float) -> None:
    bounds = bounds_of(n_layers, max(1, int(share * n_layers)))
    sizes = [end - start for start, end in zip((0, *bounds), bounds, strict=False)]
    assert bounds[-1] == n_layers
    assert max(sizes) - min(sizes) <= 1
    assert sizes == sorted(sizes, reverse=True)


def test_a_batch_goes_down_the_layers_while_others_decode_and_the_next_one_waits() -> None:
    policy = policy_with(200)
    enter(policy, 9, 10, computed=9)
    seen = []
    for _ in range(4):
        plan = policy.plan(0.0)
        seen.append([(c.seq, c.count, c.first_layer, c.last_layer) for c in plan])
        policy.apply(plan, {c.seq: 1 for c in plan if c.is_drawn}, 0.0)
        if len(seen) == 1:
            enter(policy, 1, 50)  # comes while the first batch is in flight
    assert seen == [
        [(9, 1, 0, None), (0, 200, 0, 2)],
        [(9, 1, 0, None), (0, 200, 2, 4)],
        [(9, 1, 0, None), (0, 200, 4, 6)],
        [(9, 1, 0, None), (0, 200, 6, None)],
    ]
    assert [(c.seq, c.count) for c in policy.plan(0.0)] == [(0, 1), (9, 1), (1, 50)]


def test_a_batch_stopped_inside_its_group_goes_on_to_the_groups_end() -> None:
    policy = policy_with(200)
    plan = policy.plan(0.0)
    policy.apply(plan, {}, 0.0, suspended={0: 1})
    assert [(c.first_layer, c.last_layer) for c in policy.plan(0.0)] == [(1, 2)]
