"""Named points where tests make the code fail; without effect unless the runtime arms them.

A spec is `point=action;…`, for example `decode.after_step=crash@7;kv.commit=sleep(30)`. Actions are `crash`
(exit at once, as if killed), `error` (raise `Unavailable`), `sleep(seconds)` and `stop` (SIGSTOP to this process),
each with an optional `@N` (only the N-th hit, from 1) or `%P` (every hit with probability P, from the seed).
"""

from __future__ import annotations

import os
import re
import signal
import threading
from dataclasses import dataclass
from enum import StrEnum
from random import Random

import anyio

from covey.errors import InvalidArgument, Unavailable

CRASH_EXIT_CODE = 137
"""What a shell reports for SIGKILL."""

_FAULT = re.compile(
    r"(?P<point>[a-z][a-z0-9_.]*)=(?P<action>crash|error|sleep|stop)"
    r"(?:\((?P<seconds>\d+(?:\.\d+)?)\))?(?:@(?P<nth>[1-9]\d*)|%(?P<chance>0?\.\d+|1))?"
)


class Action(StrEnum):
    CRASH = "crash"
    ERROR = "error"
    SLEEP = "sleep"
    STOP = "stop"


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """What happens at a point, and on which of its hits; neither `nth` nor `chance` means every hit."""

    point: str
    action: Action
    seconds: float = 0.0
    nth: int | None = None
    chance: float | None = None


def parse(spec: str) -> tuple[Fault, ...]:
    """Read a spec; the empty one holds no fault. Raises `InvalidArgument` naming the part that is wrong."""
    return tuple(_parse_fault(part.strip()) for part in spec.split(";") if part.strip())


def _parse_fault(text: str) -> Fault:
    match = _FAULT.fullmatch(text)
    if match is None or (match["action"] == Action.SLEEP) != (match["seconds"] is not None):
        raise InvalidArgument(
            f"failpoint {text!r} is not point=crash|error|sleep(seconds)|stop with an optional @N or %P",
            field="failpoints",
        )
    return Fault(
        point=match["point"],
        action=Action(match["action"]),
        seconds=float(match["seconds"] or 0),
        nth=int(match["nth"]) if match["nth"] else None,
        chance=float(match["chance"]) if match["chance"] else None,
    )


class Failpoints:
    """Armed faults with their hit counts; the same spec, seed and order of hits fail in the same places."""

    def __init__(self, faults: tuple[Fault, ...], *, seed: int = 0) -> None:
        self.counts: dict[str, int] = {fault.point: 0 for fault in faults}
        """Hits of each armed point so far."""
        self._faults: dict[str, list[Fault]] = {}
        for fault in faults:
            self._faults.setdefault(fault.point, []).append(fault)
        self._rng = Random(seed)  # noqa: S311 - repeatable faults, not a secret

    def due(self, point: str) -> Fault | None:
        """Count a hit of `point` and return the fault that it triggers."""
        if point not in self._faults:
            return None
        self.counts[point] += 1
        return next((fault for fault in self._faults[point] if self._strikes(fault)), None)

    def _strikes(self, fault: Fault) -> bool:
        if fault.nth is not None:
            return self.counts[fault.point] == fault.nth
        return fault.chance is None or self._rng.random() < fault.chance


_armed: Failpoints | None = None


def arm(spec: str, *, seed: int = 0) -> Failpoints:
    """Arm this process's failpoints, replacing earlier ones; return them, for their counts."""
    global _armed  # noqa: PLW0603 - one switch a process: a point costs nothing unless armed
    _armed = Failpoints(parse(spec), seed=seed)
    return _armed


def disarm() -> None:
    """Make every point harmless again."""
    global _armed  # noqa: PLW0603 - one switch a process: a point costs nothing unless armed
    _armed = None


def hit(point: str) -> None:
    """Pass a point in synchronous code; `sleep` here blocks the thread, and with it an event loop."""
    fault = _armed.due(point) if _armed is not None else None
    if fault is not None:
        if fault.action is Action.SLEEP:
            threading.Event().wait(fault.seconds)
        else:
            _strike(fault)


async def hit_async(point: str) -> None:
    """Pass a point in asynchronous code; `sleep` here only holds up this task."""
    fault = _armed.due(point) if _armed is not None else None
    if fault is not None:
        if fault.action is Action.SLEEP:
            await anyio.sleep(fault.seconds)
        else:
            _strike(fault)


def _strike(fault: Fault) -> None:
    if fault.action is Action.ERROR:
        raise Unavailable(f"failpoint {fault.point}")
    if fault.action is Action.STOP:
        os.kill(os.getpid(), signal.SIGSTOP)
    else:
        os._exit(CRASH_EXIT_CODE)  # no finally, no atexit, no flush: what a killed process leaves behind
