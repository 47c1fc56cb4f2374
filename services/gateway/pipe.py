"""A bounded, single-reader stream of events between the work and the client that watches it."""

from __future__ import annotations

from collections import deque
from typing import Generic, TypeVar

import anyio

from covey.errors import CoveyError, Overloaded

T = TypeVar("T")


class ClientTooSlow(Overloaded):
    """The reader fell too far behind."""


class Pipe(Generic[T]):
    """Items in order, then an end that may be an error. The writer never waits: workers must not, for a slow client."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._items: deque[T] = deque()
        self._ended = False
        self._error: CoveyError | None = None
        self._wake = anyio.Event()
        self._room = anyio.Event()

    def put(self, item: T) -> None:
        """Add an item.

        Raises:
            ClientTooSlow: the reader is `capacity` items behind.
        """
        if len(self._items) >= self._capacity:
            raise ClientTooSlow("the client reads too slowly; the stream was closed")
        self._items.append(item)
        self._wake.set()

    async def put_when_room(self, item: T) -> None:
        """Add an item, waiting for the reader: for work that holds up nobody else."""
        while len(self._items) >= self._capacity:
            self._room = anyio.Event()
            await self._room.wait()
        self.put(item)

    def end(self, error: CoveyError | None = None) -> None:
        """No more items; the first call decides how it ended."""
        if not self._ended:
            self._ended = True
            self._error = error
        self._wake.set()

    async def get(self) -> T | None:
        """Return the next item, or None after the last; raise the error that the stream ended with."""
        while not self._items:
            if self._ended:
                if self._error is not None:
                    raise self._error
                return None
            self._wake = anyio.Event()
            await self._wake.wait()
        self._room.set()
        return self._items.popleft()
