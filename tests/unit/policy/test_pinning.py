"""Pins follow the hint and are always bounded."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from covey.policy.pinning import PinConfig, PinPolicy
from covey.types.program import ToolHint


def test_no_tool_no_pin() -> None:
    assert PinPolicy(PinConfig()).choose(None) is None


def test_an_unknown_duration_gets_the_default() -> None:
    pin = PinPolicy(PinConfig(unknown_s=3.0)).choose(ToolHint(tool="shell"))
    assert pin is not None
    assert pin.ttl_s == 3.0


@given(st.floats(0.001, 86400))
def test_a_pin_covers_the_tool_up_to_the_cap(expected_s: float) -> None:
    config = PinConfig()
    pin = PinPolicy(config).choose(ToolHint(tool="shell", expected_s=expected_s))
    assert pin is not None
    assert min(expected_s, config.ttl_max_s) <= pin.ttl_s <= config.ttl_max_s
