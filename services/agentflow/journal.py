"""The journal of runs: one subject a run in a JetStream stream, appended only by who knows its last record."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence

from covey.errors import Fenced
from covey.net.bus import Stream
from covey.policy.flow_event import FlowChange
from covey.types.ids import RunId
from services.agentflow.record import Created, encode_changes, encode_created

STREAM = "covey_journal"
SUBJECT = "covey.v1.journal"


class Journal:
    """Appends and reads the records of runs. `owner` marks this process's writes: no other one repeats their ids."""

    def __init__(self, log: Stream, *, owner: str) -> None:
        self._log = log
        self._owner = owner

    async def create(self, run_id: RunId, created: Created) -> int:
        """Begin a run. Raises `Fenced` when it has begun already."""
        return await self._append(run_id, encode_created(created, self._owner), last=0)

    async def append(self, run_id: RunId, events: Sequence[FlowChange], *, last: int) -> int:
        """Add events after record `last` of the run; return this record's number.

        Raises:
            Fenced: the run has another last record: somebody else writes it.
            Unavailable, Overloaded: not stored, or not known to be; repeating the call is safe.
        """
        return await self._append(run_id, encode_changes(events, self._owner), last=last)

    async def _append(self, run_id: RunId, payload: bytes, *, last: int) -> int:
        subject = f"{SUBJECT}.{run_id}"
        try:
            return await self._log.append(subject, payload, expected_seq=last, msg_id=f"{run_id}:{last}:{self._owner}")
        except Fenced:
            # Perhaps by ourselves: an earlier try was stored and its answer lost. The server looks at the expected
            # number before it looks for a repeated id, so we look at what stands there; owners' records differ.
            async for record in self._log.read(subject, last + 1):
                if record.payload == payload:
                    return record.seq
                break
            raise

    async def read(self, run_id: RunId | None = None) -> AsyncIterator[tuple[RunId, int, bytes]]:
        """Yield (run, record number, record) of one run or of all, in the order they were written."""
        async for record in self._log.read(f"{SUBJECT}.{run_id or '*'}", 1):
            yield RunId(record.subject.rpartition(".")[2]), record.seq, record.payload

    async def forget(self, run_id: RunId) -> None:
        """Delete a run's records."""
        await self._log.purge(f"{SUBJECT}.{run_id}")
