"""The mesh's own NATS server, started again on the same port whenever it ends."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from random import Random

import anyio
from anyio.abc import TaskStatus

from covey.net.embedded import EmbeddedNats
from covey.retry import Backoff

Report = Callable[[str, str], None]


class KeptNats:
    """A server that comes back: `running` is the process there is now."""

    def __init__(self, run_dir: Path, report: Report) -> None:
        self._run_dir = run_dir
        self._report = report
        self.running: EmbeddedNats

    @property
    def pid(self) -> int:
        return self.running.pid

    async def keep(self, *, task_status: TaskStatus[None]) -> None:
        """Run the server until cancelled; clients reconnect to the same port with the same token."""
        backoff, rng, port, ends = Backoff(), Random(), 0, 0  # noqa: S311 - jitter, not a secret
        while True:
            async with EmbeddedNats.start(self._run_dir, port=port) as self.running:
                port = self.running.port
                self._report("nats", "ready")
                if ends == 0:
                    task_status.started()
                code = await self.running.wait()
            self._report("nats", f"exited with code {code}, starting again")
            await anyio.sleep(backoff.delay_s(ends, rng))
            ends += 1


@asynccontextmanager
async def kept_nats(run_dir: Path, report: Report) -> AsyncIterator[KeptNats]:
    """Keep a server for a block.

    Raises:
        Unavailable: it is not installed or does not come up.
    """
    server = KeptNats(run_dir, report)
    report("nats", "starting")
    async with anyio.create_task_group() as tasks:
        await tasks.start(server.keep)
        try:
            yield server
        finally:
            tasks.cancel_scope.cancel()
