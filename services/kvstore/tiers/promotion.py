"""Blocks on their way up: one flight per block, however many wait for it, and nobody's deadline ends another's."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field

import anyio
from anyio.abc import TaskGroup

from covey.errors import CoveyError
from covey.policy.disk_record import Record
from covey.types.ids import BlockHash, NamespaceId

FLIGHTS_MAX = 4096
JOBS_MAX = 4
BATCH = 8
"""Blocks of a chain that are read at once."""

Read = Callable[[NamespaceId, BlockHash], Awaitable[Record | None]]
TakeIn = Callable[[Sequence[Record]], Awaitable[int]]
Key = tuple[NamespaceId, BlockHash]

log = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class _Flight:
    """A block that comes up; `arrived` counts once `landed` is set."""

    landed: anyio.Event = field(default_factory=anyio.Event)
    arrived: bool = False


class Promotion:
    """Brings chains up in the task group of its owner, parents first, a few at a time."""

    def __init__(self, task_group: TaskGroup, read: Read, take_in: TakeIn) -> None:
        self.promoted = 0
        self._tg = task_group
        self._read = read
        self._take_in = take_in
        self._jobs = anyio.CapacityLimiter(JOBS_MAX)
        self._flights: dict[Key, _Flight] = {}

    @property
    def in_flight(self) -> int:
        """How many blocks are on their way."""
        return len(self._flights)

    async def bring_up(self, namespace: NamespaceId, hashes: Sequence[BlockHash]) -> int:
        """Wait until blocks are in memory that each grow from the one before; returns how many leading ones are.

        Cancel it at will: what has started goes on.
        """
        arrived = 0
        for flight in self.start(namespace, hashes):
            await flight.landed.wait()
            if not flight.arrived:
                break
            arrived += 1
        return arrived

    def start(self, namespace: NamespaceId, hashes: Sequence[BlockHash]) -> list[_Flight]:
        """Put blocks on their way that are not yet; the first ones when there are too many."""
        flights: list[_Flight] = []
        own: list[BlockHash] = []
        before: _Flight | None = None
        for name in hashes:
            flight = self._flights.get((namespace, name))
            if flight is None:
                if len(self._flights) >= FLIGHTS_MAX:
                    break
                flight = self._flights[namespace, name] = _Flight()
                own.append(name)
            elif own:
                break  # it waits for its own parent, which is not ours
            else:
                before = flight
            flights.append(flight)
        if own:
            self._tg.start_soon(self._job, namespace, own, before, name="promotion")
        return flights

    async def _job(self, namespace: NamespaceId, names: list[BlockHash], before: _Flight | None) -> None:
        arrived = 0
        try:
            if before is not None:
                await before.landed.wait()
                if not before.arrived:
                    return
            async with self._jobs:
                while arrived < len(names):
                    batch = names[arrived : arrived + BATCH]
                    came = await self._bring(namespace, batch)
                    for name in batch[:came]:
                        self._land(namespace, name, arrived=True)
                    arrived += came
                    if came < len(batch):
                        break
        except CoveyError as error:
            log.info("blocks stay below: %s", error)
        finally:
            for name in names[arrived:]:
                self._land(namespace, name, arrived=False)

    async def _bring(self, namespace: NamespaceId, names: Sequence[BlockHash]) -> int:
        records: dict[BlockHash, Record | None] = {}

        async def read(name: BlockHash) -> None:
            records[name] = await self._read(namespace, name)

        async with anyio.create_task_group() as tg:
            for name in names:
                tg.start_soon(read, name)
        good: list[Record] = []
        for name in names:
            record = records[name]
            if record is None or (good and record.parent != good[-1].hash):
                break
            good.append(record)
        came = await self._take_in(good) if good else 0
        self.promoted += came
        return came

    def _land(self, namespace: NamespaceId, name: BlockHash, *, arrived: bool) -> None:
        flight = self._flights.pop((namespace, name))
        flight.arrived = arrived
        flight.landed.set()
