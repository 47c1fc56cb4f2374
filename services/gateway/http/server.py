"""uvicorn inside a block of ours: our signals, our logging, our drain."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager

import anyio
import uvicorn
from starlette.types import ASGIApp

from covey.errors import Unavailable

BACKLOG = 1024


class _Server(uvicorn.Server):
    """uvicorn's server, which leaves signals to the runtime and says when it listens."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.listening = anyio.Event()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.listening.set()

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


@asynccontextmanager
async def serve_http(app: ASGIApp, listen: str, *, drain_s: float) -> AsyncIterator[str]:
    """Serve for a block; yields `host:port` as bound. On leaving: no new connections, `drain_s` for requests in flight.

    Raises:
        Unavailable: the address cannot be bound.
    """
    bound = _bind(listen)
    address = f"{bound.getsockname()[0]}:{bound.getsockname()[1]}"
    config = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        lifespan="off",
        ws="none",
        server_header=False,
        timeout_keep_alive=75,
        timeout_graceful_shutdown=max(1, round(drain_s)),
    )
    server = _Server(config)
    async with anyio.create_task_group() as tg:
        tg.start_soon(server.serve, [bound])
        try:
            await server.listening.wait()
            yield address
        finally:
            server.should_exit = True


def _bind(listen: str) -> socket.socket:
    host, _, port = listen.rpartition(":")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # With the protocol named, asyncio turns Nagle off: otherwise a body waits 40 ms for the ACK of its head.
    bound = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind((host.strip("[]") or "127.0.0.1", int(port)))
        bound.listen(BACKLOG)
    except (OSError, ValueError) as error:
        bound.close()
        raise Unavailable(f"cannot listen on {listen}: is the port taken?", field="http_listen") from error
    return bound
