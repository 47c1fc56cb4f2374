"""The `/metrics` endpoint of a process."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from prometheus_client import CollectorRegistry, start_http_server

from covey.errors import Unavailable


@contextmanager
def serve_metrics(listen: str, registry: CollectorRegistry) -> Iterator[str]:
    """Serve a registry over HTTP on `host:port` for a block, from a thread; yields the bound address.

    Raises:
        Unavailable: the address cannot be bound.
    """
    host, _, port = listen.rpartition(":")
    host = host or "127.0.0.1"
    try:
        server, thread = start_http_server(int(port), addr=host, registry=registry)
    except (OSError, ValueError, OverflowError) as error:
        raise Unavailable(f"cannot serve metrics on {listen}", field="metrics_listen") from error
    try:
        yield f"{host}:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
