"""A real NATS server for tests: started from the packaged binary, killed and restarted by pid."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from types import TracebackType
from typing import Self

import anyio

from covey.net.embedded import EmbeddedNats
from covey.testing import free_port


class NatsServer:
    """A server on one port for the length of a block, that the test may kill and start again."""

    def __init__(self, run_dir: Path) -> None:
        self.port = free_port()
        self._run_dir = run_dir
        self._stack = AsyncExitStack()
        self._server: EmbeddedNats | None = None
        self._token = ""

    @property
    def url(self) -> str:
        return f"nats://127.0.0.1:{self.port}"

    @property
    def server(self) -> EmbeddedNats:
        assert self._server is not None, "the server is down"
        return self._server

    @property
    def token(self) -> str:
        return self._token

    @property
    def token_file(self) -> Path:
        return self._run_dir / "nats" / "token"

    async def start(self) -> None:
        self._server = await self._stack.enter_async_context(EmbeddedNats.start(self._run_dir, port=self.port))
        self._token = self._server.token

    async def kill(self, number: signal.Signals = signal.SIGKILL) -> None:
        """Send a signal that ends it, and wait until it is gone."""
        os.kill(self.server.pid, number)
        await self.server.wait()
        self._server = None
        await self._stack.aclose()

    def freeze(self) -> None:
        os.kill(self.server.pid, signal.SIGSTOP)

    def thaw(self) -> None:
        os.kill(self.server.pid, signal.SIGCONT)

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with anyio.CancelScope(shield=True):
            if self._server is not None:
                self.thaw()
            await self._stack.aclose()


@asynccontextmanager
async def nats_server(run_dir: Path) -> AsyncIterator[NatsServer]:
    """Run a NATS server with JetStream for a block."""
    async with NatsServer(run_dir) as server:
        yield server


def is_alive(pid: int) -> bool:
    """Tell whether a process runs; a zombie does not."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


async def exited(process: asyncio.subprocess.Process, timeout_s: float = 20.0) -> int:
    """Wait for a process to end and return its exit code."""
    with anyio.fail_after(timeout_s):
        return await process.wait()
