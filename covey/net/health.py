"""grpc.health.v1 with both methods: Watch hears NOT_SERVING before the server stops taking calls."""

from __future__ import annotations

from typing import Any, Final

import anyio
import grpc
from grpc_health.v1 import health_pb2

HEALTH_SERVICE: Final = "grpc.health.v1.Health"
_SERVING: Final = health_pb2.HealthCheckResponse.SERVING
_NOT_SERVING: Final = health_pb2.HealthCheckResponse.NOT_SERVING
_UNKNOWN: Final = health_pb2.HealthCheckResponse.SERVICE_UNKNOWN


class Health:
    """The state of one server and its services; all share one state."""

    def __init__(self, services: tuple[str, ...]) -> None:
        self._services = frozenset(("", HEALTH_SERVICE, *services))
        self._serving = True
        self._closed = False
        self._changed = anyio.Event()

    def set_serving(self, serving: bool) -> None:
        self._serving = serving
        self._notify()

    def close(self) -> None:
        """End all watches, after they have heard the last state."""
        self._closed = True
        self._notify()

    def handlers(self) -> dict[str, Any]:
        """Return the method handlers by path."""
        codecs = {
            "request_deserializer": health_pb2.HealthCheckRequest.FromString,
            "response_serializer": health_pb2.HealthCheckResponse.SerializeToString,
        }
        return {
            f"/{HEALTH_SERVICE}/Check": grpc.unary_unary_rpc_method_handler(self._check, **codecs),
            f"/{HEALTH_SERVICE}/Watch": grpc.unary_stream_rpc_method_handler(self._watch, **codecs),
        }

    def _state(self, service: str) -> Any:
        if service not in self._services:
            return _UNKNOWN
        return _SERVING if self._serving else _NOT_SERVING

    def _notify(self) -> None:
        self._changed.set()
        self._changed = anyio.Event()

    async def _check(self, request: Any, context: Any) -> Any:
        state = self._state(request.service)
        if state == _UNKNOWN:
            await context.abort(grpc.StatusCode.NOT_FOUND, "no such service here")
        return health_pb2.HealthCheckResponse(status=state)

    async def _watch(self, request: Any, context: Any) -> None:
        last = None
        while True:
            changed, state = self._changed, self._state(request.service)
            if state != last:
                await context.write(health_pb2.HealthCheckResponse(status=state))
                last = state
                continue  # it may have changed during the write
            if self._closed:
                return
            await changed.wait()
