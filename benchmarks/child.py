"""A driver seen from the benchmark: a process that computes only while it is asked, and stands still otherwise."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from covey.clock import Clock
from covey.errors import DeadlineExceeded, Unavailable

ROOT = Path(__file__).resolve().parent.parent
GRACE_S = 2.0
LOG_TAIL_LINES = 12
READ_BYTES = 1 << 16
# The project's folder comes last: nothing in it hides a package of the environment that runs the driver.
START = "import sys, runpy; sys.path.append(sys.argv.pop(1)); runpy.run_module(sys.argv.pop(1), run_name='__main__')"


class OperationFailed(Unavailable):
    """A driver answered that an operation failed; it takes the next one."""


class Child:
    """One driver. Between `ask`s its whole process group is stopped, so that its threads cannot spin beside others'.

    The group stays in this session: if the benchmark dies, the kernel wakes it with a hang-up.
    """

    def __init__(
        self,
        command: Sequence[str],
        *,
        environment: Mapping[str, str],
        log: Path,
        clock: Clock,
    ) -> None:
        """Start it. Raises Unavailable when the program is not there."""
        self._clock, self._log, self._buffer = clock, log, b""
        try:
            with log.open("wb") as sink:
                self._process = subprocess.Popen(
                    command,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=sink,
                    env=dict(environment),
                    cwd=log.parent,
                    process_group=0,
                )
        except OSError as error:
            raise Unavailable(f"cannot start {command[0]}: {error}") from error
        self._is_stopped = self._is_closed = False

    @property
    def pid(self) -> int:
        """Of the driver; its helpers are in its group."""
        return self._process.pid

    def until_ready(self, limit_s: float) -> str:
        """Wait until it has loaded; returns its version. Raises Unavailable, DeadlineExceeded."""
        version = str(self._answer(limit_s)["ready"])
        self._stop()
        return version

    def ask(self, operation: str, limit_s: float, **arguments: Any) -> Any:
        """Let it run one operation. Raises Unavailable when that fails, DeadlineExceeded when it takes too long."""
        self._continue()
        line = json.dumps({"op": operation, **arguments}) + "\n"
        try:
            assert self._process.stdin is not None
            self._process.stdin.write(line.encode())
            self._process.stdin.flush()
        except OSError as error:
            raise Unavailable(f"it has ended: {self.tail()}") from error
        answer = self._answer(limit_s)
        self._stop()
        if "error" in answer:
            raise OperationFailed(f"{operation} failed: {answer['error']}")
        return answer["result"]

    def close(self) -> None:
        """End the whole group, whatever it is doing; without effect the second time."""
        if self._is_closed:
            return
        self._is_closed = True
        self._continue()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                try:
                    pipe.close()
                except BrokenPipeError:
                    pass  # what it was asked last was never read
        try:
            self._process.wait(GRACE_S)
        except subprocess.TimeoutExpired:
            pass
        self._signal(signal.SIGKILL)
        self._process.wait()

    def tail(self) -> str:
        """The last lines of its log."""
        return "\n".join(self._log.read_text(errors="replace").splitlines()[-LOG_TAIL_LINES:])

    def _answer(self, limit_s: float) -> dict[str, Any]:
        assert self._process.stdout is not None
        source, until = self._process.stdout.fileno(), self._clock.now() + limit_s
        while b"\n" not in self._buffer:
            left_s = until - self._clock.now()
            if left_s <= 0 or not select.select([source], [], [], left_s)[0]:
                raise DeadlineExceeded(f"no answer within {limit_s:g} s:\n{self.tail()}")
            found = os.read(source, READ_BYTES)
            if not found:
                raise Unavailable(f"it ended without an answer:\n{self.tail()}")
            self._buffer += found
        line, _, self._buffer = self._buffer.partition(b"\n")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _stop(self) -> None:
        self._signal(signal.SIGSTOP)
        self._is_stopped = True

    def _continue(self) -> None:
        if self._is_stopped:
            self._signal(signal.SIGCONT)
            self._is_stopped = False

    def _signal(self, number: signal.Signals) -> None:
        try:
            os.killpg(self._process.pid, number)
        except ProcessLookupError:
            pass  # all of it has ended


def driver_command(python: Path | str, module: str, *arguments: str) -> list[str]:
    """How `python` runs a module of `benchmarks.drivers`; `-P` keeps the working directory off its path."""
    return [str(python), "-P", "-c", START, str(ROOT), f"benchmarks.drivers.{module}", *arguments]


def plain_environment() -> dict[str, str]:
    """Ours, without what belongs to our own Python and thread settings, and without a way to a model hub."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "OMP_", "GOMP_", "KMP_", "MKL_"))}
    kept.pop("VIRTUAL_ENV", None)
    return kept | {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
