"""What the cache counts; labels are configured names only, never content or tenants."""

from __future__ import annotations

from covey.policy.false_hits import Estimate
from covey.telemetry import Metrics
from covey.types.program import CacheOutcome

SECONDS = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0)


class CacheMetrics:
    """The cache's instruments, registered in the service's registry."""

    def __init__(self, metrics: Metrics) -> None:
        self._lookups = metrics.counter("semcache_lookups", "Look-ups by what came of them", ["outcome", "category"])
        self._seconds = metrics.histogram(
            "semcache_lookup_seconds", "Time of a look-up by what came of it", ["outcome"], buckets=SECONDS
        )
        self._offers = metrics.counter("semcache_offers", "Answers offered", ["stored", "category"])
        self._removals = metrics.counter("semcache_removals", "Entries that went, by cause", ["cause"])
        self._unencoded = metrics.counter(
            "semcache_unencoded", "Requests that went on without the semantic tier, by cause", ["cause"]
        )
        self._built = metrics.histogram(
            "semcache_generation_seconds",
            "Time to build an index generation",
            buckets=(0.1, 0.5, 1, 5, 10, 30, 60, 300),
        )
        self._built_entries = metrics.counter("semcache_generation_entries", "Entries built into index generations")
        self._relaxed = metrics.counter("semcache_relaxed_hits", "Hits that only load allowed", ["category"])
        self._false = metrics.gauge(
            "semcache_false_hit_share",
            "Estimated share of wrong semantic hits, and its 95 % interval",
            ["category", "at"],
        )
        self._judged = metrics.counter("semcache_judged", "Verdicts on semantic hits", ["category"])
        self._suspended = metrics.gauge(
            "semcache_suspended", "Whether a category's look-ups do not pay for themselves", ["category"]
        )
        self._flights = metrics.counter(
            "semcache_flights", "Requests that shared one computation, by what became of it", ["result"]
        )
        self._entries = metrics.gauge("semcache_entries", "Entries held")
        self._bytes = metrics.gauge("semcache_bytes", "Bytes accounted to entries")
        self._encoder = metrics.gauge("semcache_encoder_ready", "Whether the encoder has loaded")

    def lookup(self, outcome: CacheOutcome, category: str, seconds: float) -> None:
        self._lookups.labels(outcome=outcome.value, category=category).inc()
        self._seconds.labels(outcome=outcome.value).observe(seconds)

    def offer(self, *, stored: bool, category: str) -> None:
        self._offers.labels(stored=str(stored).lower(), category=category).inc()

    def removed(self, count: int, cause: str) -> None:
        self._removals.labels(cause=cause).inc(count)

    def flight(self, result: str) -> None:
        self._flights.labels(result=result).inc()

    def built(self, entries: int, seconds: float) -> None:
        self._built.observe(seconds)
        self._built_entries.inc(entries)

    def unencoded(self, cause: str) -> None:
        self._unencoded.labels(cause=cause).inc()

    def relaxed(self, category: str) -> None:
        self._relaxed.labels(category=category).inc()

    def judged(self, category: str, estimate: Estimate) -> None:
        self._judged.labels(category=category).inc()
        for at, value in (("estimate", estimate.share), ("low", estimate.low), ("high", estimate.high)):
            self._false.labels(category=category, at=at).set(value)

    def suspended(self, category: str, *, is_suspended: bool) -> None:
        self._suspended.labels(category=category).set(is_suspended)

    def level(self, *, entries: int, size_bytes: int, encoder_ready: bool) -> None:
        self._entries.set(entries)
        self._bytes.set(size_bytes)
        self._encoder.set(encoder_ready)
