"""All runs of this process: begins them once by key, resumes the open ones, finds the finished ones again."""

from __future__ import annotations

import logging
import secrets
from collections import OrderedDict
from hashlib import blake2b

import anyio
from anyio.abc import TaskGroup

from covey.actor import Inbox
from covey.codec.messages import decode, encode
from covey.errors import AlreadyExists, CoveyError, DataCorrupt, Fenced, Internal, NotFound, Overloaded, Unavailable
from covey.net.call import sole
from covey.policy.flow import FlowRun
from covey.policy.flow_event import FlowChange, RunEnded
from covey.policy.flow_state import FlowLimits
from covey.policy.workflow import Graph, graph
from covey.retry import Backoff
from covey.types.flow import RunState, RunView, SubmitRun
from covey.types.ids import RunId, TenantId
from services.agentflow.blob import INLINE_BYTES_MAX
from services.agentflow.executor import CancelRun, Executor, Message
from services.agentflow.journal import Journal
from services.agentflow.live import LiveRun
from services.agentflow.record import Created, digest_of
from services.agentflow.record import decode as read_record
from services.agentflow.view import summary_of
from services.agentflow.work import Surroundings

log = logging.getLogger(__name__)

INBOX_MAX = 256
CREATE_TRIES = 4
CLOSING_MAX = 64
"""Ended runs whose program the gateway has yet to close."""


class Runs:
    """Opened with `open`, which replays the journal; executors live in `tasks`."""

    def __init__(
        self,
        journal: Journal,
        around: Surroundings,
        tasks: TaskGroup,
        *,
        limits: FlowLimits,
        open_max: int,
        runs_max: int,
        in_memory_max: int,
    ) -> None:
        self._journal = journal
        self._around = around
        self._tasks = tasks
        self._limits = limits
        self._open_max = open_max
        self._runs_max = runs_max
        self._in_memory_max = in_memory_max
        self._live: OrderedDict[RunId, LiveRun] = OrderedDict()
        self._inboxes: dict[RunId, Inbox[Message]] = {}
        self._index: OrderedDict[RunId, tuple[TenantId, RunView]] = OrderedDict()
        self._loading: dict[RunId, anyio.Lock] = {}
        self._stopping = False
        self._executor_ended = anyio.Event()

    @property
    def open_count(self) -> int:
        """Runs that have not ended; the executors of some that have are still tidying up."""
        return sum((live := self._live.get(run_id)) is None or not live.state.ended for run_id in self._inboxes)

    async def replay(self) -> int:
        """Read the journal, list what has ended and resume what has not; return how many were resumed."""
        begun: dict[RunId, tuple[int, Created, list[FlowChange]]] = {}
        async for run_id, seq, payload in self._journal.read():
            try:
                record = read_record(payload)
            except DataCorrupt as error:
                log.error("run cannot be read run=%s reason=%s", run_id, error.message)
                begun.pop(run_id, None)
                continue
            if isinstance(record, Created):
                begun[run_id] = (seq, record, [])
            elif run_id in begun:
                _, created, changes = begun[run_id]
                changes.extend(record)
                begun[run_id] = (seq, created, changes)
                if isinstance(changes[-1], RunEnded):
                    self._list_ended(run_id, created, changes)
                    del begun[run_id]
        for run_id, (seq, created, changes) in begun.items():
            try:
                live = await self._rebuild(run_id, created, changes, seq)
            except CoveyError as error:
                log.error("run cannot be resumed run=%s code=%s reason=%s", run_id, error.code, error.message)
                continue
            self._begin(live)
        return self.open_count

    async def submit(self, tenant: TenantId, request: SubmitRun) -> tuple[RunId, bool]:
        """Begin a run, or find the one that this key began: (run, whether it existed).

        Raises:
            InvalidArgument: the workflow is wrong; names node and variable.
            AlreadyExists: the key began a run of another body.
            Overloaded: as many runs are open as may be.
        """
        if self._stopping:
            raise Unavailable("agentflow is stopping", retry_after_ms=1000)
        shape = graph(request.workflow, request.inputs)
        digest = digest_of(request)
        run_id = _run_id(tenant, request.idempotency_key)
        known = await self._known(run_id)
        if known is None:
            if self.open_count >= self._open_max or len(self._inboxes) >= self._open_max + CLOSING_MAX:
                raise Overloaded(f"{self._open_max} runs are open: wait for one to end", retry_after_ms=1000)
            live = await self._create(run_id, tenant, request, digest, shape)
            if live is not None:
                self._begin(live)
                return run_id, False
            known = await self._load(run_id)
        if known.tenant != tenant or known.digest != digest:
            raise AlreadyExists("this idempotency key began another run", field="idempotency_key")
        if not known.state.ended and run_id not in self._inboxes:
            self._begin(known)  # begun by an attempt whose answer was lost
        return run_id, True

    async def find(self, tenant: TenantId, run_id: RunId) -> LiveRun:
        """Return a run of the tenant. Raises `NotFound`, for another tenant's too."""
        live = await self._known(run_id) if run_id in self._index else None
        if live is None or live.tenant != tenant:
            raise NotFound(f"there is no run {run_id!r}", field="run_id")
        return live

    def listed(self, tenant: TenantId, state: RunState | None, limit: int) -> tuple[RunView, ...]:
        """Return the tenant's runs without their nodes, the youngest first."""
        found: list[RunView] = []
        for run_id, (owner, view) in reversed(self._index.items()):
            if owner == tenant:
                live = self._live.get(run_id)
                current = summary_of(live) if live is not None else view
                if state is None or current.state is state:
                    found.append(current)
                    if len(found) == limit:
                        break
        return tuple(found)

    def cancel(self, live: LiveRun) -> None:
        """Ask a run to stop; it has stopped when it has ended."""
        inbox = self._inboxes.get(live.run_id)
        if inbox is not None:
            inbox.signal(CancelRun())

    async def stop(self, grace_s: float) -> None:
        """Stop executors without ending their runs, and tell who waits for a run to ask again."""
        self._stopping = True
        for inbox in tuple(self._inboxes.values()):
            inbox.drain()
        with anyio.move_on_after(grace_s):
            while self._inboxes:
                await self._executor_ended.wait()
        for live in self._live.values():
            live.leave()

    # -- beginning and finding -----------------------------------------------

    async def _create(
        self, run_id: RunId, tenant: TenantId, request: SubmitRun, digest: bytes, shape: Graph
    ) -> LiveRun | None:
        """Journal a new run; None when it had begun already."""
        now = self._around.clock.wall()
        spec = encode(request)
        large = len(spec) > INLINE_BYTES_MAX
        created = Created(
            tenant=tenant,
            digest=digest,
            created_s=now,
            workflow=request.workflow.name,
            spec=b"" if large else spec,
            spec_blob=await self._around.blobs.put(tenant, spec) if large else "",
        )
        for attempt in range(CREATE_TRIES):
            try:
                record = await self._journal.create(run_id, created)
            except Fenced:
                return None
            except CoveyError as error:
                if not error.retryable or attempt == CREATE_TRIES - 1:
                    raise
                await anyio.sleep(Backoff().delay_s(attempt, self._around.rng))
            else:
                return self._new(run_id, created, request, shape, record)
        return None

    def _new(self, run_id: RunId, created: Created, request: SubmitRun, shape: Graph, record: int) -> LiveRun:
        state = FlowRun(shape, created_s=created.created_s, deadline_s=request.deadline_s, limits=self._limits)
        return LiveRun(
            run_id=run_id, tenant=created.tenant, submit=request, digest=created.digest, state=state, record=record
        )

    async def _known(self, run_id: RunId) -> LiveRun | None:
        live = self._live.get(run_id)
        if live is not None:
            self._live.move_to_end(run_id)
            return live
        return await self._load(run_id) if run_id in self._index else None

    async def _load(self, run_id: RunId) -> LiveRun:
        """Read a run from the journal again; one reader a run."""
        lock = self._loading.setdefault(run_id, anyio.Lock())
        try:
            async with lock:
                if run_id in self._live:
                    return self._live[run_id]
                created: Created | None = None
                changes: list[FlowChange] = []
                seq = 0
                async for _, seq, payload in self._journal.read(run_id):  # noqa: B007 - the last one counts
                    record = read_record(payload)
                    if isinstance(record, Created):
                        created = record
                    else:
                        changes.extend(record)
                if created is None:
                    raise NotFound(f"there is no run {run_id!r}", field="run_id")
                live = await self._rebuild(run_id, created, changes, seq)
                if run_id not in self._live:  # begun while it was read
                    self._remember(live)
                return self._live[run_id]
        finally:
            if not lock.statistics().tasks_waiting:
                self._loading.pop(run_id, None)

    async def _rebuild(self, run_id: RunId, created: Created, changes: list[FlowChange], seq: int) -> LiveRun:
        spec = created.spec or await self._around.blobs.get(created.tenant, created.spec_blob)
        request: SubmitRun = decode(SubmitRun, spec)
        live = self._new(run_id, created, request, graph(request.workflow, request.inputs), seq)
        try:
            live.apply(changes, seq)
        except CoveyError as error:
            raise DataCorrupt(f"the journal of run {run_id!r} contradicts its workflow: {error.message}") from error
        return live

    def _remember(self, live: LiveRun) -> None:
        self._live[live.run_id] = live
        self._index[live.run_id] = (live.tenant, summary_of(live))
        self._forget()

    def _list_ended(self, run_id: RunId, created: Created, changes: list[FlowChange]) -> None:
        last = changes[-1]
        assert isinstance(last, RunEnded)
        view = RunView(
            run_id=run_id,
            state=last.state,
            workflow=created.workflow,
            seq=len(changes) + 1,
            created_s=created.created_s,
            ended_s=last.at_s,
            error_code=last.code,
            error=last.message,
        )
        self._index[run_id] = (created.tenant, view)
        self._forget()

    def _forget(self) -> None:
        """Hold the bounds: whole runs in memory, and runs listed; open runs are never forgotten."""
        for run_id in [r for r in self._live if r not in self._inboxes][
            : max(len(self._live) - self._in_memory_max, 0)
        ]:
            live = self._live.pop(run_id)
            self._index[run_id] = (live.tenant, summary_of(live))
        while len(self._index) > self._runs_max:
            oldest = next((r for r in self._index if r not in self._inboxes), None)
            if oldest is None:
                return
            del self._index[oldest]
            self._live.pop(oldest, None)
            self._tasks.start_soon(self._purge, oldest)

    async def _purge(self, run_id: RunId) -> None:
        try:
            await self._journal.forget(run_id)
        except CoveyError as error:  # read again at the next start, and forgotten then
            log.warning("journal of an old run not purged run=%s code=%s", run_id, error.code)

    # -- executing -----------------------------------------------------------

    def _begin(self, live: LiveRun) -> None:
        if live.run_id in self._inboxes:
            return
        inbox: Inbox[Message] = Inbox(INBOX_MAX)
        self._inboxes[live.run_id] = inbox
        self._remember(live)
        self._tasks.start_soon(self._execute, live, inbox, name=f"run {live.run_id}")

    async def _execute(self, live: LiveRun, inbox: Inbox[Message]) -> None:
        """Own a run's executor. What it cannot survive ends this run, not the others."""
        try:
            await Executor(live, self._journal, self._around).run(inbox)
        except Exception as error:
            cause = sole(error)
            log.error("run stopped run=%s error=%s", live.run_id, type(cause).__name__, exc_info=error)
            self._live.pop(live.run_id, None)  # its state may be behind the journal
            if not isinstance(cause, Fenced):
                await self._fail(live, cause)
        finally:
            inbox.stop()
            self._inboxes.pop(live.run_id, None)
            self._executor_ended.set()
            self._executor_ended = anyio.Event()
            self._index[live.run_id] = (live.tenant, summary_of(live))
            self._forget()

    async def _fail(self, live: LiveRun, cause: BaseException) -> None:
        code = cause.code if isinstance(cause, CoveyError) else Internal.code
        message = f"agentflow could not go on: {type(cause).__name__}"
        event = RunEnded(at_s=self._around.clock.wall(), state=RunState.FAILED, code=code, message=message)
        try:
            live.apply([event], await self._journal.append(live.run_id, [event], last=live.record))
        except CoveyError as error:
            log.error("run left open run=%s code=%s", live.run_id, error.code)


def _run_id(tenant: TenantId, key: str) -> RunId:
    """One key of one tenant is one run, whichever process is asked."""
    if not key:
        return RunId(f"run-{secrets.token_hex(16)}")
    return RunId(f"run-{blake2b(f'{len(tenant)}:{tenant}{key}'.encode(), digest_size=16).hexdigest()}")
