"""The `/metrics` endpoint of a process."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial

import anyio
from prometheus_client import CollectorRegistry, start_http_server

from covey.errors import Unavailable


@asynccontextmanager
async def serve_metrics(listen: str, registry: CollectorRegistry) -> AsyncIterator[str]:
    """Serve a registry over HTTP on `host:port` for a block, from a thread; yields the bound address.

    Raises:
        Unavailable: the address cannot be bound.
    """
    host, _, port = listen.rpartition(":")
    host = host or "127.0.0.1"
    start = partial(start_http_server, addr=host, registry=registry)
    try:
        server, thread = await anyio.to_thread.run_sync(start, int(port))  # looks the host name up: may block
    except (OSError, ValueError, OverflowError) as error:
        raise Unavailable(f"cannot serve metrics on {listen}", field="metrics_listen") from error
    try:
        yield f"{host}:{server.server_port}"
    finally:
        with anyio.CancelScope(shield=True):
            await anyio.to_thread.run_sync(server.shutdown)
            server.server_close()
            await anyio.to_thread.run_sync(thread.join)
