"""A bounded window of idempotency keys: the same request twice is done once and answered twice."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Generic, TypeVar

from covey.errors import AlreadyExists, Overloaded

R = TypeVar("R")


@dataclass(frozen=True, slots=True)
class Fresh:
    """Not seen within the window: do the work, then call `finish` or `abandon`."""


@dataclass(frozen=True, slots=True)
class InFlight:
    """Being worked on: wait for it or answer `Pending`."""

    since: float


@dataclass(frozen=True, slots=True)
class Done(Generic[R]):
    """Done before: answer with `result`."""

    result: R


@dataclass(slots=True)
class _Entry(Generic[R]):
    digest: bytes
    at: float
    done: Done[R] | None = None


class DedupeWindow(Generic[R]):
    """Remembers what was asked under a key, and its result, for `ttl_s` after it was done.

    Holds at most `capacity` keys: past that the oldest result is forgotten first, and when everything is in
    flight new keys are refused. In-flight keys never age out, since forgetting one would run its work twice.
    Keys are the caller's namespace: put the tenant into them.
    """

    def __init__(self, *, capacity: int, ttl_s: float) -> None:
        if capacity < 1 or ttl_s <= 0:
            raise ValueError("a dedupe window needs capacity >= 1 and ttl_s > 0")
        self._capacity = capacity
        self._ttl_s = ttl_s
        self._in_flight: dict[str, _Entry[R]] = {}
        self._finished: OrderedDict[str, _Entry[R]] = OrderedDict()  # by time of completion

    def __len__(self) -> int:
        return len(self._in_flight) + len(self._finished)

    def begin(self, key: str, digest: bytes, *, now: float) -> Fresh | InFlight | Done[R]:
        """Say what is known of `key`; `digest` is a hash of the request's body.

        Raises:
            AlreadyExists: the key was used for another body.
            Overloaded: the window is full of requests in flight.
        """
        self.expire(now)
        entry = self._in_flight.get(key) or self._finished.get(key)
        if entry is None:
            self._make_room()
            self._in_flight[key] = _Entry(digest, now)
            return Fresh()
        if entry.digest != digest:
            raise AlreadyExists("this idempotency key was used for another request", field="idempotency_key")
        return InFlight(entry.at) if entry.done is None else entry.done

    def finish(self, key: str, result: R, *, now: float) -> None:
        """Record the result of a key that `begin` called fresh. Raises `KeyError` if it is not in flight."""
        entry = self._in_flight.pop(key)
        entry.at, entry.done = now, Done(result)
        self._finished[key] = entry

    def abandon(self, key: str) -> None:
        """Forget a key in flight whose work left no effect, so that it can be retried; else do nothing."""
        self._in_flight.pop(key, None)

    def expire(self, now: float) -> int:
        """Forget results older than the window; return how many."""
        count = 0
        while self._finished:
            key, entry = next(iter(self._finished.items()))
            if now < entry.at + self._ttl_s:
                break
            del self._finished[key]
            count += 1
        return count

    def check(self) -> None:
        """Assert the window's invariants."""
        assert len(self) <= self._capacity
        assert not self._in_flight.keys() & self._finished.keys()
        assert all(entry.done is None for entry in self._in_flight.values())
        times = [entry.at for entry in self._finished.values()]
        assert times == sorted(times)
        assert all(entry.done is not None for entry in self._finished.values())

    def _make_room(self) -> None:
        if len(self) >= self._capacity:
            if not self._finished:
                raise Overloaded("too many requests with idempotency keys are in flight")
            self._finished.popitem(last=False)
