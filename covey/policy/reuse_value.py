"""What a cached block is worth: how likely it is used again, times what computing it again would cost."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class ReuseValue:
    """Both factors of the worth. Time is counted in uses of the pool, so that an idle pool does not forget.

    The chance of reuse is taken to be proportional to the uses so far, each counted half after `half_life` others.
    Since all of them fade alike, the order of two blocks never changes while nobody uses them: a worth is computed once
    and can be kept in a heap.
    """

    half_life: float = 64.0
    depth_scale: float = 128.0
    """The depth in the chain, in blocks, at which attending to what comes before costs as much as all the rest."""

    def use(self, heat: float, idle: int) -> float:
        """The faded number of uses after one more, `idle` uses of the pool after the last one."""
        return 1.0 + heat * math.exp2(-idle / self.half_life)

    def worth(self, *, heat: float, used: int, depth: int) -> float:
        """The logarithm of the worth, seen from tick 0, of a block last used at tick `used` with `heat` uses then."""
        return math.log2(max(heat, 1.0) * (1.0 + depth / self.depth_scale)) + used / self.half_life
