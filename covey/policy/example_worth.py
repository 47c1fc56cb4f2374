"""What examples are worth keeping: a knapsack by decayed gain per byte, and which of them to answer anew off-peak."""

from __future__ import annotations

from dataclasses import dataclass

DECAY_PER_HOUR = 0.9
"""An example's gain fades by this (IC-Cache, section 5)."""
REPLAYS_MAX = 5
"""An example is answered anew at most so often (IC-Cache, section 5)."""


@dataclass(slots=True)
class _Worth:
    size_bytes: int
    offloads: float = 0.0
    replay_gain: float = 0.0
    at: float = 0.0
    replays: int = 0


class ExampleWorth:
    """Books of one pool of examples, bounded by `size_bytes_max`; `now` is in seconds and never goes back."""

    def __init__(self, *, size_bytes_max: int, smoothing: float = 0.2) -> None:
        """`smoothing` is the weight of the newest reuse in the mean gain of a replay."""
        if size_bytes_max < 0 or not 0.0 < smoothing <= 1.0:
            raise ValueError("size_bytes_max must not be negative and smoothing lie in (0, 1]")
        self._max = size_bytes_max
        self._smoothing = smoothing
        self._worth: dict[str, _Worth] = {}
        self.size_bytes = 0

    def __contains__(self, example: str) -> bool:
        return example in self._worth

    def __len__(self) -> int:
        return len(self._worth)

    def add(self, example: str, size_bytes: int, now: float) -> None:
        """Enter an example; a known one keeps its books at its new size."""
        known = self._worth.get(example)
        if known is None:
            known = self._worth[example] = _Worth(size_bytes=0, at=now)
        self.size_bytes += size_bytes - known.size_bytes
        known.size_bytes = size_bytes

    def remove(self, example: str) -> None:
        """Forget an example, known or not."""
        known = self._worth.pop(example, None)
        if known is not None:
            self.size_bytes -= known.size_bytes

    def used(self, example: str, *, offloaded: bool, quality: float, cost: float, now: float) -> None:
        """A request saw this example. `quality` in [0, 1] of its answer, `cost` in [0, 1] of the model it took.

        The gain of refining an example is (1 - quality) x cost, as a moving mean over its uses (IC-Cache, section 5).
        """
        known = self._worth.get(example)
        if known is None:
            return
        known.offloads = _faded(known, now) + offloaded
        known.at = now
        known.replay_gain += self._smoothing * ((1.0 - quality) * cost - known.replay_gain)

    def evict(self, now: float) -> list[str]:
        """Forget what has least gain per byte until the rest fits; return it. Greedy: a knapsack of one dimension."""
        order = sorted(self._worth, key=lambda name: (_faded(self._worth[name], now) / self._size(name), name))
        gone = []
        for name in order:
            if self.size_bytes <= self._max:
                break
            self.remove(name)
            gone.append(name)
        return gone

    def replay(self) -> str | None:
        """The example whose better answer would gain most; None when none would. Each is named a few times at most."""
        open_ = (name for name, worth in self._worth.items() if worth.replays < REPLAYS_MAX and worth.replay_gain > 0)
        best = max(open_, key=lambda name: (self._worth[name].replay_gain, name), default=None)
        if best is not None:
            self._worth[best].replays += 1
        return best

    def replayed(self, example: str, *, improved: bool) -> None:
        """A replay ended: one that brought nothing better ends the replays of this example."""
        known = self._worth.get(example)
        if known is not None:
            known.replay_gain = 0.0
            if not improved:
                known.replays = REPLAYS_MAX

    def check(self) -> None:
        """Assert the invariants that hold between any two calls."""
        assert self.size_bytes == sum(worth.size_bytes for worth in self._worth.values())
        assert all(worth.replays <= REPLAYS_MAX and worth.offloads >= 0 for worth in self._worth.values())

    def _size(self, name: str) -> int:
        return max(1, self._worth[name].size_bytes)


def _faded(worth: _Worth, now: float) -> float:
    return float(worth.offloads * DECAY_PER_HOUR ** ((now - worth.at) / 3600.0))
