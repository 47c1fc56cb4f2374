"""What Covey's tests stand on, for yours: virtual time, waiting for conditions, free ports."""

from __future__ import annotations

import asyncio
import functools
import inspect
import math
import selectors
import socket
import threading
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from typing import Any, ParamSpec, TypeVar

import anyio

P = ParamSpec("P")
T = TypeVar("T")

THREAD_WAIT_S = 30.0
"""Real seconds that virtual time stands still for while a worker thread computes."""


class Deadlock(RuntimeError):
    """Under virtual time: no task can run, no timer is pending and no thread is busy."""


class _JumpSelector(selectors.BaseSelector):
    """Polls the real selector; instead of waiting, moves virtual time to the next timer."""

    def __init__(self) -> None:
        self._real = selectors.DefaultSelector()
        self.now = 0.0
        self.loop: asyncio.AbstractEventLoop | None = None

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        ready = self._real.select(0)
        if ready or getattr(self.loop, "_ready", None):  # callbacks run before time passes
            return ready
        if self._threads_busy():  # its result comes through the loop's self-pipe and takes no virtual time
            ready = self._real.select(THREAD_WAIT_S)
            if ready:
                return ready
        if timeout is None:
            raise Deadlock("nothing is ready and no timer is pending: every task waits for another")
        # asyncio waits at most a day at a time, and rounds: read the timer itself, so that a sleeper wakes at
        # its exact moment. nextafter: once the spacing of floats exceeds asyncio's resolution of 1 ns, a timer
        # due now counts as not yet due, and the loop would spin for ever.
        timers = getattr(self.loop, "_scheduled", None)
        due: float = timers[0].when() if timers else self.now + timeout
        self.now = max(due, math.nextafter(self.now, math.inf))
        return []

    def register(self, fileobj: Any, events: int, data: Any = None) -> selectors.SelectorKey:
        return self._real.register(fileobj, events, data)

    def unregister(self, fileobj: Any) -> selectors.SelectorKey:
        return self._real.unregister(fileobj)

    def modify(self, fileobj: Any, events: int, data: Any = None) -> selectors.SelectorKey:
        return self._real.modify(fileobj, events, data)

    def get_map(self) -> Mapping[Any, selectors.SelectorKey]:
        return self._real.get_map()

    def close(self) -> None:
        self._real.close()

    def _threads_busy(self) -> bool:
        """Whether an anyio worker thread of this loop is computing; anyio has no public way to ask."""
        for thread in threading.enumerate():
            if getattr(thread, "loop", None) is not self.loop or getattr(thread, "stopping", True):
                continue
            if thread not in getattr(thread, "idle_workers", (thread,)):
                return True
        return False


class VirtualTimeLoop(asyncio.SelectorEventLoop):
    """An asyncio loop whose clock starts at 0 and jumps to the next timer whenever nothing is ready.

    A year of timeouts passes in milliseconds, and a deadlock raises `Deadlock` instead of hanging. Work in
    anyio's threads takes no virtual time. Sockets work but their delays do not exist: keep to in-memory
    transports. Siblings are cancelled in no particular order: never depend on it.
    """

    def __init__(self) -> None:
        self._jump = _JumpSelector()
        super().__init__(self._jump)
        self._jump.loop = self

    def time(self) -> float:
        return self._jump.now


def virtual_time(main: Callable[P, Coroutine[Any, Any, T]]) -> Callable[P, T]:
    """Turn an async function into a synchronous one that runs on a fresh `VirtualTimeLoop`.

    Decorates a test (its fixtures stay visible to pytest, and must not be async ones), or runs anything:
    `virtual_time(main)(arguments)`.
    """

    @functools.wraps(main)
    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        with asyncio.Runner(loop_factory=VirtualTimeLoop) as runner:
            return runner.run(main(*args, **kwargs))

    return run


class VirtualClock:
    """A `covey.clock.Clock` for tests: follows a `VirtualTimeLoop` if made inside one, and moves by hand."""

    def __init__(self, *, wall_start: float = 1_700_000_000.0) -> None:
        self._wall_start = wall_start
        self._offset_s = 0.0
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:
            self._loop: VirtualTimeLoop | None = None
        else:
            self._loop = loop if isinstance(loop, VirtualTimeLoop) else None

    def now(self) -> float:
        return (self._loop.time() if self._loop is not None else 0.0) + self._offset_s

    def wall(self) -> float:
        return self._wall_start + self.now()

    def advance(self, seconds: float) -> float:
        """Move this clock (not the loop's timers) forward; return the new time."""
        if seconds < 0:
            raise ValueError("time does not go backwards")
        self._offset_s += seconds
        return self.now()

    def jump_wall(self, seconds: float) -> None:
        """Set the wall clock forward or back, as an operator or NTP does; `now` is not touched."""
        self._wall_start += seconds


async def assert_eventually(
    predicate: Callable[[], object | Awaitable[object]], timeout_s: float = 5.0, *, every_s: float = 0.01
) -> Any:
    """Wait until `predicate`, plain or async, returns something true, and return that.

    Raises `AssertionError` with the predicate's source and last value after `timeout_s`. An `AssertionError`
    in the predicate counts as not yet.
    """
    last: object = None
    with anyio.move_on_after(timeout_s):
        while True:
            try:
                last = predicate()
                if inspect.isawaitable(last):
                    last = await last
                if last:
                    return last
            except AssertionError as error:
                last = error
            await anyio.sleep(every_s)
    raise AssertionError(f"not true within {timeout_s} s: {_source(predicate)}; last value: {last!r}")


def _source(predicate: Callable[..., object]) -> str:
    try:
        return " ".join(inspect.getsource(predicate).split())
    except (OSError, TypeError):
        return repr(predicate)


def free_port() -> int:
    """Return a TCP port on 127.0.0.1 that was free just now; bind port 0 instead where the API allows it."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
