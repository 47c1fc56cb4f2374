"""Which stored blocks are worth keeping: how likely each is read again, times what computing it again would cost."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

BUCKETS = 24
"""Times since the last use, in powers of two from `BUCKET_S` on: up to some days."""
BUCKET_S = 0.125
CLASSES = 4
"""Blocks never read, read once, two or three times, more often: each kind has its own chance of reuse."""
OBSERVED_MAX = 100_000.0
"""Past so many observations of a kind all are halved: what is learned follows the load."""
FRESH_EVERY = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidates:
    """What a policy sees of blocks that may go, as columns of equal length."""

    idle_s: Floats
    """Time since the last use."""
    reads: Ints
    depth: Ints
    """Place in the chain, from 0."""
    slot_bytes: Ints
    below: NDArray[np.bool_]
    """Whether a lower tier has a copy."""


class Retention(Protocol):
    """Says what keeping blocks is worth, and learns from what happens to them."""

    def worth(self, blocks: Candidates) -> Floats:
        """Return a worth for each; the least goes first."""
        ...

    def read(self, idle_s: Floats, reads: Ints) -> None:
        """Blocks were read `idle_s` after their last use, having been read so often before."""
        ...

    def evicted(self, idle_s: float, reads: int) -> None:
        """A block went without having been read again."""
        ...


class LeastRecentlyUsed:
    """The one that was not used for the longest time goes first."""

    def worth(self, blocks: Candidates) -> Floats:
        return -blocks.idle_s

    def read(self, idle_s: Floats, reads: Ints) -> None:
        """Nothing to learn."""

    def evicted(self, idle_s: float, reads: int) -> None:
        """Nothing to learn."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RecomputeCost:
    """What a miss costs, in any unit of time: a block of tokens is computed, attending to `depth` blocks before it."""

    block_s: float = 0.02
    attention_depth: float = 256.0
    """The depth at which attending to what comes before costs as much as all the rest."""
    memory_bytes_per_s: float = 4e9
    below_bytes_per_s: float = 5e8
    below_latency_s: float = 0.0005

    def saved_s(self, blocks: Candidates) -> Floats:
        """What having each block here saves when it is read: computing it again, or fetching it from below."""
        again_s = self.block_s * (1.0 + blocks.depth / self.attention_depth)
        fetch_s = self.below_latency_s + blocks.slot_bytes / self.below_bytes_per_s
        miss_s = np.where(blocks.below, np.minimum(again_s, fetch_s), again_s)
        return np.maximum(miss_s - blocks.slot_bytes / self.memory_bytes_per_s, 0.0)


class ReuseValue:
    """Chance of reuse within a horizon × time saved / bytes.

    The chance is learned. For each kind of block (how often it was read) and each age since its last use, in
    powers of two, it counts how many blocks came to that age and how many of those were then read: their ratio
    is the hazard, and one minus the product of the chances to stay unread over the horizon is what is asked for
    (Kaplan and Meier 1958; blocks that were evicted count up to the age that they had then).
    """

    def __init__(self, *, cost: RecomputeCost | None = None, horizon_s: float = 600.0) -> None:
        self._cost = cost or RecomputeCost()
        self._horizon_s = horizon_s
        self._reached = np.zeros((CLASSES, BUCKETS))
        self._read = np.zeros((CLASSES, BUCKETS))
        self._news = 0
        self._unseen: list[tuple[Floats, Ints]] = []
        self._chance = self._learned()

    def worth(self, blocks: Candidates) -> Floats:
        chance = self._chance[_class_of(blocks.reads), _bucket_of(blocks.idle_s)]
        # Among equals the one that has waited longest goes: ages within a bucket differ, their chances do not.
        tie = 1.0 - 1e-6 * np.minimum(blocks.idle_s, 1e5) / 1e5
        return chance * self._cost.saved_s(blocks) / blocks.slot_bytes * tie

    def read(self, idle_s: Floats, reads: Ints) -> None:
        self._unseen.append((idle_s, reads))
        self._news += len(idle_s)
        if self._news >= FRESH_EVERY:
            self.learn()

    def evicted(self, idle_s: float, reads: int) -> None:
        bucket = min(max(math.frexp(idle_s / BUCKET_S)[1] - 1, 0), BUCKETS - 1) if idle_s > 0 else 0
        self._reached[(reads > 0) + (reads > 1) + (reads > 3), :bucket] += 1.0
        self._news += 1
        if self._news >= FRESH_EVERY:
            self.learn()

    def learn(self) -> None:
        """Let the worth of blocks follow what was observed; happens by itself, a few hundred observations late."""
        if self._unseen:
            idle_s, reads = (np.concatenate(column) for column in zip(*self._unseen, strict=True))
            where = _class_of(reads) * BUCKETS + _bucket_of(idle_s)
            counts = np.bincount(where, minlength=CLASSES * BUCKETS).reshape(CLASSES, BUCKETS)
            self._read += counts
            self._reached += counts[:, ::-1].cumsum(axis=1)[:, ::-1]
            self._unseen.clear()
        self._news = 0
        full = self._reached[:, :1] > OBSERVED_MAX
        self._reached = np.where(full, self._reached / 2, self._reached)
        self._read = np.where(full, self._read / 2, self._read)
        self._chance = self._learned()

    def chance(self, idle_s: float, reads: int) -> float:
        """Return the chance that such a block is read within the horizon, as far as learned."""
        return float(self._chance[_class_of(np.array([reads]))[0], _bucket_of(np.array([idle_s]))[0]])

    def check(self) -> None:
        """Assert that the counts fit together and that chances are chances."""
        assert (self._read >= 0).all()
        assert (self._read <= self._reached + 1e-6).all(), "more blocks were read at an age than came to it"
        assert ((self._learned() >= 0) & (self._learned() <= 1)).all()

    def _learned(self) -> Floats:
        """Chances by kind and age. Before anything is known a use makes another one likely, less so with age."""
        known = np.arange(BUCKETS)
        prior = np.outer(1.0 - 0.5 ** np.arange(1, CLASSES + 1), 0.5 ** (known / 4.0)) * 0.25
        hazard = (self._read + 4.0 * prior) / (self._reached + 4.0)
        ages_s = BUCKET_S * 2.0**known
        unread = np.ones((CLASSES, BUCKETS))
        for later in range(BUCKETS):
            # The share of this bucket's span that lies within the horizon of each age up to it.
            span_s = np.clip(ages_s[: later + 1] + self._horizon_s - ages_s[later], 0.0, ages_s[later]) / ages_s[later]
            unread[:, : later + 1] *= (1.0 - hazard[:, later, None]) ** span_s
        return 1.0 - unread


def _class_of(reads: Ints) -> Ints:
    return (reads > 0).astype(np.int64) + (reads > 1) + (reads > 3)


def _bucket_of(idle_s: Floats) -> Ints:
    exponents = np.frexp(np.maximum(idle_s, 0.0) / BUCKET_S)[1].astype(np.int64)
    return np.clip(exponents - 1, 0, BUCKETS - 1)
