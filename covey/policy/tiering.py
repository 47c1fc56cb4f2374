"""Which blocks go down, which come up, and when: the worth of a block is what it would cost not to have it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from covey.types.ids import TenantId


@dataclass(frozen=True, slots=True, kw_only=True)
class TieringConfig:
    """When memory is fuller than `high`, blocks are copied down until all above `low` could go at no cost.

    `recompute_s_per_mib` is what an engine takes to compute a mebibyte of blocks at the start of a chain; a block
    `depth_doubling` blocks deep costs twice that, for attention looks at all before it. `horizon_s` is how far ahead
    reuse counts, `prior_s` how long a block that was used once is worth waiting for.
    """

    high: float = 0.8
    low: float = 0.6
    recompute_s_per_mib: float = 0.1
    depth_doubling: int = 256
    horizon_s: float = 600.0
    prior_s: float = 120.0

    def __post_init__(self) -> None:
        if not 0 < self.low <= self.high <= 1:
            raise ValueError("watermarks need 0 < low <= high <= 1")
        if min(self.recompute_s_per_mib, self.depth_doubling, self.horizon_s, self.prior_s) <= 0:
            raise ValueError("costs and times are positive")


@dataclass(frozen=True, slots=True, kw_only=True)
class Chain:
    """A run of blocks as the policy sees it: the deepest block decides how long it has been idle."""

    tenant: TenantId
    size_bytes: int
    depth: int
    """Of its first block."""
    idle_s: float = 0.0
    uses: int = 1


class RateMeter:
    """Time that a tier takes: a part for each call and a part for each byte, as running averages of what was seen."""

    WEIGHT = 0.2

    def __init__(self, *, bytes_per_s: float, call_s: float) -> None:
        """Start from a guess; a few observations replace it."""
        if bytes_per_s <= 0 or call_s < 0:
            raise ValueError("a tier has a positive rate")
        self._s_per_byte = 1.0 / bytes_per_s
        self._call_s = call_s

    @property
    def bytes_per_s(self) -> float:
        return 1.0 / self._s_per_byte

    def observe(self, size_bytes: int, took_s: float) -> None:
        """Learn from a call that moved so many bytes; what is beyond the time per call is the bytes' share."""
        if size_bytes <= 0 or took_s <= 0:
            return
        self._call_s += self.WEIGHT * (min(self._call_s, took_s) - self._call_s)
        share_s = max(took_s - self._call_s, 0.1 * took_s)
        self._s_per_byte += self.WEIGHT * (share_s / size_bytes - self._s_per_byte)

    def estimate_s(self, blocks: int, size_bytes: int) -> float:
        """Return how long it would take to move so many blocks of so many bytes in all."""
        return blocks * self._call_s + size_bytes * self._s_per_byte


class Tiering:
    """The rules of movement; pure, so the caller brings all numbers."""

    def __init__(self, config: TieringConfig | None = None) -> None:
        self.config = config or TieringConfig()

    def reuse_probability(self, idle_s: float, uses: int) -> float:
        """Return how likely a block is used again within the horizon.

        Uses come as a Poisson process of unknown rate with a Gamma prior (one use in `prior_s`); so the waiting
        time to the next one is Lomax: P = 1 - ((prior + idle) / (prior + idle + horizon)) ** uses.
        """
        waited_s = self.config.prior_s + max(0.0, idle_s)
        base: float = (waited_s / (waited_s + self.config.horizon_s)) ** max(1, uses)
        return 1.0 - base

    def recompute_s(self, chain: Chain) -> float:
        """Return what an engine would take to compute the chain's blocks anew."""
        depth_factor = 1.0 + chain.depth / self.config.depth_doubling
        return self.config.recompute_s_per_mib * chain.size_bytes / (1 << 20) * depth_factor

    def worth(self, chain: Chain) -> float:
        """Return the seconds that a byte is expected to save: reuse probability times recompute cost per byte."""
        return self.reuse_probability(chain.idle_s, chain.uses) * self.recompute_s(chain) / max(1, chain.size_bytes)

    def can_promote(self, chain: Chain, load_s: float) -> bool:
        """Whether to bring a chain up before anybody waits for it: expected to save more than it costs."""
        return self.reuse_probability(chain.idle_s, chain.uses) * self.recompute_s(chain) > load_s

    def can_demote(self, chain: Chain, load_s: float) -> bool:
        """Whether a chain is worth a place below: to load it must be cheaper than to compute it anew."""
        return self.recompute_s(chain) > load_s

    def clean_bytes(self, used_bytes: int, capacity_bytes: int) -> int:
        """Return how many bytes of memory must also lie below, or go: 0 while memory is not fuller than `high`."""
        if used_bytes <= self.config.high * capacity_bytes:
            return 0
        return used_bytes - int(self.config.low * capacity_bytes)

    def demote_first(self, chains: Iterable[Chain], over_quota: frozenset[TenantId]) -> list[int]:
        """Return the order, by position, in which chains go down: tenants over their quota first, then by worth."""
        numbered = list(enumerate(chains))
        numbered.sort(key=lambda each: (each[1].tenant not in over_quota, self.worth(each[1]), each[0]))
        return [number for number, _ in numbered]
