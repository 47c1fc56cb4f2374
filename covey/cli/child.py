"""One child process of a mesh: started with a readiness pipe, logged to a file, ended by pid."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import anyio
from anyio.abc import Process

from covey.errors import DeadlineExceeded, Unavailable

LOG_TAIL_LINES = 15
READY_BYTES_MAX = 65536
KILL_WAIT_S = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ChildSpec:
    """What to run: the service `module`, its instance name, flags and environment on top of ours."""

    name: str
    module: str
    flags: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)

    def command(self, ready_fd: int) -> list[str]:
        """`-P` keeps the working directory off the path: a user's own `services/` folder is never run."""
        flags = [*self.flags, "--die-with-parent", "--ready-fd", str(ready_fd)]
        return [sys.executable, "-P", "-m", self.module, *flags]


class Child:
    """A running child: `addresses` is what it said when it became ready."""

    def __init__(self, spec: ChildSpec, process: Process, log: Path) -> None:
        self.spec = spec
        self.process = process
        self.log = log
        self.addresses: Mapping[str, str] = {}

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def running(self) -> bool:
        return self.process.returncode is None

    @classmethod
    async def start(cls, spec: ChildSpec, log: Path, *, timeout_s: float) -> Child:
        """Start the process and wait until it says that it is ready.

        Raises:
            Unavailable: it ended first; the message holds the end of its log.
            DeadlineExceeded: it was not ready within `timeout_s`, and has been killed.
        """
        read_fd, write_fd = os.pipe()
        try:
            with log.open("ab") as sink:
                process = await anyio.open_process(
                    spec.command(write_fd),
                    stdin=subprocess.DEVNULL,
                    stdout=sink,
                    stderr=sink,
                    env={**os.environ, **spec.environment},
                    pass_fds=(write_fd,),
                    # Ctrl-C in the terminal reaches the launcher alone: it drains the children in order.
                    start_new_session=True,
                )
        except BaseException:
            os.close(read_fd)
            raise
        finally:
            os.close(write_fd)
        child = cls(spec, process, log)
        try:
            with anyio.fail_after(timeout_s):
                child.addresses = await child._ready(read_fd)
        except TimeoutError as error:
            await child.kill()
            raise DeadlineExceeded(f"{spec.name} was not ready within {timeout_s:g} s; its log: {log}") from error
        except BaseException:
            await child.kill()
            raise
        finally:
            os.close(read_fd)
        return child

    async def _ready(self, fd: int) -> Mapping[str, str]:
        said = b""
        while not said.endswith(b"\n"):
            await anyio.wait_readable(fd)
            piece = os.read(fd, READY_BYTES_MAX)
            if not piece:
                code = await self.process.wait()
                raise Unavailable(f"{self.spec.name} ended at start with exit code {code}:\n{self.tail()}")
            said += piece
        addresses: Mapping[str, str] = json.loads(said)
        return addresses

    def tail(self) -> str:
        """The last lines of its log."""
        lines = self.log.read_text(errors="replace").splitlines()
        return "\n".join(lines[-LOG_TAIL_LINES:])

    async def stop(self, *, grace_s: float) -> int:
        """Ask it to drain, wait up to `grace_s`, then kill it. Returns its exit code."""
        if self.running:
            self.process.send_signal(signal.SIGTERM)
            with anyio.move_on_after(grace_s):
                return await self.process.wait()
        return await self.kill()

    async def kill(self) -> int:
        """End it at once."""
        with anyio.CancelScope(shield=True), anyio.fail_after(KILL_WAIT_S):
            if self.running:
                self.process.kill()
            await self.process.wait()
        return self.process.returncode or 0
