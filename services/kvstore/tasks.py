"""Long work on stored blocks: started by an RPC, followed and cancelled by its id, bounded in number."""

from __future__ import annotations

import logging
import secrets
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

import anyio
from anyio.abc import TaskGroup

from covey.errors import CoveyError, NotFound, Overloaded, Unimplemented
from covey.types.kv_state import StartTask, TaskKind, TaskState, TaskStatus

RUNNING_MAX = 8
REMEMBERED_MAX = 512
WHY_CHARS_MAX = 512

log = logging.getLogger(__name__)


class Progress:
    """What a running task tells of itself."""

    __slots__ = ("done", "total")

    def __init__(self) -> None:
        self.done = 0
        self.total = 0

    def expect(self, blocks: int) -> None:
        """Say how many blocks there are in all; a later call corrects an earlier one."""
        self.total = blocks

    def step(self, blocks: int = 1) -> None:
        """Say that so many further blocks are done."""
        self.done += blocks


Handler: TypeAlias = Callable[[StartTask, Progress], Awaitable[str]]
"""Does the work of one kind of task and returns what it found, for `TaskStatus.why`; raises `CoveyError` to fail."""


@dataclass(slots=True, eq=False)
class _Entry:
    name: str
    request: StartTask
    state: TaskState = TaskState.RUNNING
    why: str = ""
    progress: Progress = field(default_factory=Progress)
    scope: anyio.CancelScope = field(default_factory=anyio.CancelScope)

    def status(self) -> TaskStatus:
        return TaskStatus(
            task=self.name, kind=self.request.kind, state=self.state, done=self.progress.done,
            total=self.progress.total, why=self.why[:WHY_CHARS_MAX],
        )  # fmt: skip


class Tasks:
    """Runs tasks in the group of its owner. Finished ones are remembered until `remembered_max` newer ones started."""

    def __init__(
        self,
        task_group: TaskGroup,
        handlers: Mapping[TaskKind, Handler],
        *,
        running_max: int = RUNNING_MAX,
        remembered_max: int = REMEMBERED_MAX,
    ) -> None:
        self._tg = task_group
        self._handlers = dict(handlers)
        self._running_max = running_max
        self._remembered_max = remembered_max
        self._entries: dict[str, _Entry] = {}
        self._running = 0

    @property
    def running(self) -> int:
        """How many tasks run now."""
        return self._running

    def start(self, request: StartTask) -> TaskStatus:
        """Start a task; its id cannot be guessed. Raises `Unimplemented` for a kind without a handler, `Overloaded`."""
        handler = self._handlers.get(request.kind)
        if handler is None:
            raise Unimplemented(f"this store does not do {request.kind}", field="kind")
        if self._running >= self._running_max:
            raise Overloaded(f"{self._running} tasks are running", retry_after_ms=1000)
        entry = _Entry(name=f"{request.kind.lower()}-{secrets.token_hex(8)}", request=request)
        self._entries[entry.name] = entry
        self._forget()
        self._running += 1
        self._tg.start_soon(self._run, handler, entry, name=entry.name)
        return entry.status()

    def get(self, task: str) -> TaskStatus:
        """Say how far a task is. Raises `NotFound` when it never was, or ended long ago."""
        return self._entry(task).status()

    def cancel(self, task: str) -> TaskStatus:
        """Tell a task to stop; without effect on one that has ended. Raises `NotFound`."""
        entry = self._entry(task)
        entry.scope.cancel()
        return entry.status()

    async def _run(self, handler: Handler, entry: _Entry) -> None:
        try:
            with entry.scope:
                if entry.request.deadline_s:
                    entry.scope.deadline = anyio.current_time() + entry.request.deadline_s
                entry.why = await handler(entry.request, entry.progress)
                entry.state = TaskState.DONE
        except CoveyError as error:
            entry.state, entry.why = TaskState.FAILED, error.message
        except Exception:
            log.exception("task %s failed", entry.name)
            entry.state, entry.why = TaskState.FAILED, "an internal fault; the log of the store has it"
        finally:
            self._running -= 1
            if entry.state is TaskState.RUNNING:
                late = entry.scope.deadline <= anyio.current_time()
                entry.state = TaskState.FAILED if late else TaskState.CANCELLED
                entry.why = "it took longer than its deadline" if late else ""

    def _entry(self, task: str) -> _Entry:
        entry = self._entries.get(task)
        if entry is None:
            raise NotFound("no such task, or it ended long ago", field="task")
        return entry

    def _forget(self) -> None:
        ended = (name for name, entry in self._entries.items() if entry.state is not TaskState.RUNNING)
        for name in tuple(ended)[: max(0, len(self._entries) - self._remembered_max)]:
            del self._entries[name]
