"""The rules of movement between tiers: worth, watermarks, quotas, rates."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from covey.policy.tiering import Chain, RateMeter, Tiering, TieringConfig
from covey.types.ids import TenantId

TENANTS = [TenantId(name) for name in "abc"]
chains = st.builds(
    Chain,
    tenant=st.sampled_from(TENANTS),
    size_bytes=st.integers(1, 1 << 24),
    depth=st.integers(0, 5000),
    idle_s=st.floats(0, 1e6),
    uses=st.integers(1, 50),
)


@given(chain=chains, more_s=st.floats(1, 1e6), uses=st.integers(1, 50), deeper=st.integers(1, 1000))
def test_worth_falls_with_idleness_and_grows_with_use_and_depth(
    chain: Chain, more_s: float, uses: int, deeper: int
) -> None:
    policy = Tiering()
    assert 0 < policy.reuse_probability(chain.idle_s, chain.uses) <= 1
    assert policy.reuse_probability(chain.idle_s + more_s, chain.uses) <= policy.reuse_probability(
        chain.idle_s, chain.uses
    )
    assert policy.reuse_probability(chain.idle_s, chain.uses + uses) >= policy.reuse_probability(
        chain.idle_s, chain.uses
    )
    below = Chain(
        tenant=chain.tenant, size_bytes=chain.size_bytes, depth=chain.depth + deeper, idle_s=chain.idle_s,
        uses=chain.uses,
    )  # fmt: skip
    assert policy.worth(below) > policy.worth(chain)
    assert policy.recompute_s(below) > policy.recompute_s(chain)


@given(chain=chains, load_s=st.floats(0, 100))
def test_what_is_promoted_would_also_be_kept_below(chain: Chain, load_s: float) -> None:
    policy = Tiering()
    if policy.can_promote(chain, load_s):
        assert policy.can_demote(chain, load_s)
        assert load_s < policy.recompute_s(chain)


@given(
    used=st.integers(0, 1 << 30), capacity=st.integers(1, 1 << 30),
    marks=st.tuples(st.floats(0.01, 1), st.floats(0.01, 1)).map(sorted),
)  # fmt: skip
def test_watermarks_ask_for_nothing_below_high_and_for_all_above_low_beyond_it(
    used: int, capacity: int, marks: list[float]
) -> None:
    policy = Tiering(TieringConfig(low=marks[0], high=marks[1]))
    clean = policy.clean_bytes(used, capacity)
    if used <= marks[1] * capacity:
        assert clean == 0
    else:
        assert clean > 0
        assert abs(used - clean - marks[0] * capacity) <= 1, "what is left unclean fits below the low mark"


@given(st.lists(chains, max_size=20), st.sets(st.sampled_from(TENANTS)))
def test_tenants_over_their_quota_go_first_then_the_least_worth(found: list[Chain], over: set[TenantId]) -> None:
    policy = Tiering()
    order = policy.demote_first(found, frozenset(over))
    assert sorted(order) == list(range(len(found)))
    keys = [(found[number].tenant not in over, policy.worth(found[number])) for number in order]
    assert keys == sorted(keys)


@given(call_s=st.floats(1e-5, 0.01), rate=st.floats(1e6, 1e10), size=st.integers(1 << 16, 1 << 24))
def test_a_meter_learns_the_rate_that_it_sees(call_s: float, rate: float, size: int) -> None:
    meter = RateMeter(bytes_per_s=1e8, call_s=0.001)
    took_s = call_s + size / rate
    for _ in range(60):
        meter.observe(size, took_s)
    assert meter.estimate_s(1, size) == pytest.approx(took_s, rel=0.35)
    assert meter.estimate_s(2, 2 * size) == pytest.approx(2 * meter.estimate_s(1, size))
    before = meter.bytes_per_s
    meter.observe(0, 1.0)
    meter.observe(10, 0.0)
    assert meter.bytes_per_s == before, "a call that moved nothing tells nothing"


@pytest.mark.parametrize(
    "bad", [{"low": 0.9, "high": 0.5}, {"high": 1.5}, {"low": 0.0}, {"horizon_s": 0.0}, {"recompute_s_per_mib": -1.0}]
)
def test_a_config_that_makes_no_sense_is_refused(bad: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=r"watermarks|positive"):
        TieringConfig(**bad)  # type: ignore[arg-type]
