"""How long a call's blocks stay in the worker after its end: while the tool that follows is expected to run."""

from __future__ import annotations

from dataclasses import dataclass

from covey.types.generate import Afterwards
from covey.types.program import ToolHint


@dataclass(frozen=True, slots=True, kw_only=True)
class PinConfig:
    """`slack` multiplies the expected time; `margin_s` covers the way back; `ttl_max_s` bounds what a hint can ask."""

    slack: float = 1.5
    margin_s: float = 0.5
    unknown_s: float = 2.0
    ttl_max_s: float = 60.0

    def __post_init__(self) -> None:
        if self.slack < 1 or self.margin_s < 0 or not 0 < self.unknown_s <= self.ttl_max_s:
            raise ValueError("pinning needs slack >= 1, margin_s >= 0 and 0 < unknown_s <= ttl_max_s")


@dataclass(frozen=True, slots=True, kw_only=True)
class Pin:
    """Keep the blocks for `ttl_s` seconds, `then` demote or drop them."""

    ttl_s: float
    then: Afterwards = Afterwards.DEMOTE


class PinPolicy:
    """Hint-driven: no next tool, no pin; a tool without an expected time gets `unknown_s`."""

    def __init__(self, config: PinConfig) -> None:
        self._config = config

    def choose(self, then_tool: ToolHint | None) -> Pin | None:
        """The pin for a call that just ended, or None: let the worker demote its blocks."""
        if then_tool is None:
            return None
        config = self._config
        if then_tool.expected_s <= 0:
            return Pin(ttl_s=config.unknown_s)
        return Pin(ttl_s=min(config.ttl_max_s, then_tool.expected_s * config.slack + config.margin_s))
