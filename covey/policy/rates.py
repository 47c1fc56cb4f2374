"""What a tenant may use per minute: token buckets of requests and of tokens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from covey.errors import QuotaExceeded
from covey.types.ids import TenantId

MINUTE_S = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Rate:
    """A tenant's limits; None means none."""

    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None


@dataclass(slots=True)
class _Bucket:
    per_minute: float
    level: float
    filled_at: float

    def fill(self, now: float) -> None:
        gained = max(0.0, now - self.filled_at) * self.per_minute / MINUTE_S
        self.level = min(self.per_minute, self.level + gained)
        self.filled_at = now

    def wait_s(self, wanted: float) -> float:
        return max(0.0, (wanted - self.level) * MINUTE_S / self.per_minute)


class Rates:
    """Buckets that hold a minute's worth. Tokens are spent when a request has ended, so that level may be negative."""

    def __init__(self, rates: Mapping[TenantId, Rate], now: float) -> None:
        self._requests = _buckets({t: r.requests_per_minute for t, r in rates.items()}, now)
        self._tokens = _buckets({t: r.tokens_per_minute for t, r in rates.items()}, now)

    def admit(self, tenant: TenantId, now: float) -> None:
        """Count one request. Raises QuotaExceeded, with the time until it would pass; then nothing is counted."""
        requests, tokens = self._requests.get(tenant), self._tokens.get(tenant)
        waits = []
        for bucket, wanted in ((requests, 1.0), (tokens, 0.0)):
            if bucket is not None:
                bucket.fill(now)
                waits.append(bucket.wait_s(wanted))
        wait_s = max(waits, default=0.0)
        if wait_s > 0:
            raise QuotaExceeded("this tenant's limit per minute is used up", retry_after_ms=round(wait_s * 1000) + 1)
        if requests is not None:
            requests.level -= 1

    def spend(self, tenant: TenantId, tokens: int, now: float) -> None:
        """Count the tokens of a request that has ended."""
        bucket = self._tokens.get(tenant)
        if bucket is not None:
            bucket.fill(now)
            bucket.level -= tokens

    def check(self) -> None:
        """Invariants; raises AssertionError."""
        for bucket in (*self._requests.values(), *self._tokens.values()):
            assert bucket.level <= bucket.per_minute
        assert all(bucket.level >= 0 for bucket in self._requests.values())


def _buckets(limits: Mapping[TenantId, int | None], now: float) -> dict[TenantId, _Bucket]:
    return {t: _Bucket(per_minute=n, level=n, filled_at=now) for t, n in limits.items() if n is not None}
