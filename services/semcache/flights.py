"""Single flight: of equal requests that miss at the same time one asks the model, the others wait for its answer."""

from __future__ import annotations

from dataclasses import dataclass, field
from random import Random

import anyio

from covey.clock import Clock
from covey.types.ids import TenantId
from covey.types.semcache import CachedAnswer

from .config import Config
from .metrics import CacheMetrics

Key = tuple[TenantId, str, str, bytes]
"""Whose, which model's, which category's and which request's answer."""


@dataclass(slots=True, eq=False)
class Flight:
    """A request that somebody computes for all; `ended` wakes those who wait, `answer` is what they get."""

    id: str
    key: Key
    until: float
    waiting: int = 0
    answer: CachedAnswer | None = None
    ended: anyio.Event = field(default_factory=anyio.Event)


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """What a request is to do: take `answer`, or compute it, for others too if it has a `flight`."""

    answer: CachedAnswer | None = None
    flight: str = ""


class Flights:
    """All flights of this process; owned by the event loop, bounded: beyond that each request computes by itself."""

    def __init__(
        self, *, flights_max: int, waiting_max: int, lease_s: float, clock: Clock, rng: Random, metrics: CacheMetrics
    ) -> None:
        """A leader that says nothing for `lease_s` is given up; `waiting_max` bounds those who wait for one flight."""
        self._flights_max = flights_max
        self._waiting_max = waiting_max
        self._lease_s = lease_s
        self._clock = clock
        self._rng = rng
        self._metrics = metrics
        self._flights: dict[Key, Flight] = {}
        self._ids: dict[tuple[TenantId, str], Flight] = {}

    def __len__(self) -> int:
        return len(self._flights)

    async def join(self, key: Key, *, wait_s: float) -> Turn:
        """Lead the flight of `key` if there is none, else wait for its answer, at most `wait_s`.

        Who waits when the leader gives up or its lease ends takes over, one of them as the next leader.
        """
        until = self._clock.now() + wait_s
        while True:
            flight = self._flights.get(key)
            if flight is not None and flight.until <= self._clock.now():
                self._metrics.flight("expired")
                self._end(flight)
                flight = None
            if flight is None:
                return self._lead(key)
            if flight.waiting >= self._waiting_max:
                self._metrics.flight("crowded")
                return Turn()
            if await self._wait(flight, until) and flight.answer is not None:
                self._metrics.flight("followed")
                return Turn(answer=flight.answer)
            if self._clock.now() >= until:
                self._metrics.flight("late")
                return Turn()

    def land(self, tenant: TenantId, flight: str, answer: CachedAnswer | None) -> bool:
        """End a flight with its answer, or without one; False when it is not under way (any more)."""
        found = self._ids.get((tenant, flight))
        if found is None:
            return False
        found.answer = answer
        self._metrics.flight("landed" if answer is not None else "abandoned")
        self._end(found)
        return True

    def void(self, tenant: TenantId) -> None:
        """Give up every flight of a tenant: what was computed before an invalidation must not be handed on."""
        for flight in [flight for (owner, _), flight in self._ids.items() if owner == tenant]:
            self._end(flight)

    def sweep(self) -> None:
        """End flights whose lease is over; those who wait see to it themselves too."""
        now = self._clock.now()
        for flight in [flight for flight in self._flights.values() if flight.until <= now]:
            self._metrics.flight("expired")
            self._end(flight)

    async def _wait(self, flight: Flight, until: float) -> bool:
        """Wait for the end of a flight, of its lease, or of one's patience; whether it ended."""
        flight.waiting += 1
        try:
            with anyio.move_on_after(max(0.0, min(until, flight.until) - self._clock.now())):
                await flight.ended.wait()
            return flight.ended.is_set()
        finally:
            flight.waiting -= 1

    def _lead(self, key: Key) -> Turn:
        if len(self._flights) >= self._flights_max:
            self._metrics.flight("refused")
            return Turn()
        flight = Flight(f"{self._rng.getrandbits(128):032x}", key, self._clock.now() + self._lease_s)
        self._flights[key] = self._ids[key[0], flight.id] = flight
        self._metrics.flight("led")
        return Turn(flight=flight.id)

    def _end(self, flight: Flight) -> None:
        if self._ids.pop((flight.key[0], flight.id), None) is not None:
            if self._flights.get(flight.key) is flight:
                del self._flights[flight.key]
            flight.ended.set()


def open_flights(config: Config, clock: Clock, rng: Random, metrics: CacheMetrics) -> Flights:
    """No flights yet, within the bounds of `config`."""
    return Flights(
        flights_max=config.flights_max,
        waiting_max=config.flight_waiting_max,
        lease_s=config.flight_lease_s,
        clock=clock,
        rng=rng,
        metrics=metrics,
    )
