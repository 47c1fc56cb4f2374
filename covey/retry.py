"""When to try again: backoff with full jitter, a retry budget and a circuit breaker, as pure values."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol


class Rng(Protocol):
    """Where jitter comes from: a `random.Random`."""

    def uniform(self, a: float, b: float, /) -> float: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Backoff:
    """Exponential backoff with full jitter: uniform in [0, min(ceiling, base * factor**attempt)].

    Full jitter spreads clients that failed together best (Brooker, "Exponential Backoff and Jitter", 2015).
    """

    base_s: float = 0.05
    ceiling_s: float = 2.0
    factor: float = 2.0

    def __post_init__(self) -> None:
        if not (0 < self.base_s <= self.ceiling_s and self.factor >= 1):
            raise ValueError("backoff needs 0 < base_s <= ceiling_s and factor >= 1")

    def bound_s(self, attempt: int) -> float:
        """Return the longest delay before retry number `attempt`, counted from 0."""
        try:
            return min(self.ceiling_s, self.base_s * self.factor ** max(attempt, 0))
        except OverflowError:
            return self.ceiling_s

    def delay_s(self, attempt: int, rng: Rng, *, retry_after_ms: int | None = None) -> float:
        """Return how long to wait; a server's hint is a floor that jitter is added to."""
        floor_s = max(retry_after_ms or 0, 0) / 1000
        return floor_s + rng.uniform(0, self.bound_s(attempt))


class RetryBudget:
    """Bounds retries to a share of requests, so that retries cannot multiply an outage.

    A token bucket filled by requests, not by time: each request adds `ratio`, each retry takes one whole
    token, at most `burst` tokens are kept. Over any period: retries <= burst + ratio * requests.
    """

    def __init__(self, *, ratio: float = 0.2, burst: float = 10.0) -> None:
        if not (0 <= ratio <= 1 and burst >= 0):
            raise ValueError("a retry budget needs 0 <= ratio <= 1 and burst >= 0")
        self.ratio = ratio
        self.burst = burst
        self._tokens = burst

    @property
    def tokens(self) -> float:
        """Retries that could be spent now."""
        return self._tokens

    def record_request(self) -> None:
        """Count a first attempt; retries are not requests."""
        self._tokens = min(self.burst, self._tokens + self.ratio)

    def can_retry(self) -> bool:
        return self._tokens >= 1

    def retry(self) -> bool:
        """Spend a token; False (and nothing spent) when the budget is used up: give up then."""
        if not self.can_retry():
            return False
        self._tokens -= 1
        return True


class BreakerState(StrEnum):
    CLOSED = "closed"
    OPEN = "open"
    HALF_OPEN = "half_open"


@dataclass(frozen=True, slots=True)
class Attempt:
    """A permission to call, handed back with its outcome; stale ones are ignored."""

    generation: int
    started_at: float


class Breaker:
    """A circuit breaker: closed, open after consecutive failures, then one probe at a time.

    A probe that never reports frees its slot after `probe_s`. Outcomes of attempts that began before the
    breaker last changed state are ignored: a late success must not close it, a late failure not re-open it.
    """

    def __init__(self, *, failures: int = 5, open_s: float = 1.0, probe_s: float = 5.0) -> None:
        if not (failures >= 1 and open_s > 0 and probe_s > 0):
            raise ValueError("a breaker needs failures >= 1, open_s > 0 and probe_s > 0")
        self._failures_max = failures
        self._open_s = open_s
        self._probe_s = probe_s
        self._state = BreakerState.CLOSED
        self._failures = 0
        self._generation = 0
        self._opened_at = 0.0
        self._probe_at = 0.0

    def state(self, now: float) -> BreakerState:
        """Return the state; an open breaker whose time is up counts as half-open."""
        if self._state is BreakerState.OPEN and now >= self._opened_at + self._open_s:
            return BreakerState.HALF_OPEN
        return self._state

    def can_attempt(self, now: float) -> bool:
        match self._state:
            case BreakerState.CLOSED:
                return True
            case BreakerState.OPEN:
                return now >= self._opened_at + self._open_s
            case BreakerState.HALF_OPEN:  # a probe is out
                return now >= self._probe_at + self._probe_s

    def attempt(self, now: float) -> Attempt | None:
        """Take a permission to call, or None: fail fast. Report it with `succeed`, `fail` or `cancel`."""
        if not self.can_attempt(now):
            return None
        if self._state is not BreakerState.CLOSED:
            self._change(BreakerState.HALF_OPEN)
            self._probe_at = now
        return Attempt(self._generation, now)

    def succeed(self, attempt: Attempt) -> None:
        if attempt.generation == self._generation:
            self._failures = 0
            if self._state is not BreakerState.CLOSED:
                self._change(BreakerState.CLOSED)

    def fail(self, attempt: Attempt, now: float) -> None:
        if attempt.generation != self._generation:
            return
        self._failures += 1
        if self._state is BreakerState.HALF_OPEN or self._failures >= self._failures_max:
            self._open(now)

    def cancel(self, attempt: Attempt) -> None:
        """Hand an attempt back that says nothing about the other side; a probe may be sent again at once."""
        if attempt.generation == self._generation and self._state is BreakerState.HALF_OPEN:
            self._change(BreakerState.OPEN)  # its open time has passed, so the next attempt probes

    def _open(self, now: float) -> None:
        self._change(BreakerState.OPEN)
        self._opened_at = now

    def _change(self, state: BreakerState) -> None:
        self._state = state
        self._generation += 1
        self._failures = 0
