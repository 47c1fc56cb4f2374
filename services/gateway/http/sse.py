"""Server-sent events as OpenAI's clients read them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from covey.errors import CoveyError

from .errors import error_body
from .exchange import Exchange

_encoder = msgspec.json.Encoder()


class EventStream:
    """Writes `data:` events; headers go out with the first."""

    def __init__(self, x: Exchange) -> None:
        self._x = x

    async def open(self, headers: Mapping[str, str]) -> None:
        """Send the headers, once."""
        if not self._x.is_started:
            await self._x.start(
                "text/event-stream; charset=utf-8",
                headers={"cache-control": "no-cache", "x-accel-buffering": "no", **headers},
            )

    async def data(self, value: Any) -> None:
        await self._x.send_body(b"data: " + _encoder.encode(value) + b"\n\n", more=True)

    async def heartbeat(self) -> None:
        """A comment: clients skip it, proxies keep the connection."""
        await self._x.send_body(b": heartbeat\n\n", more=True)

    async def error(self, error: CoveyError) -> None:
        """An error inside a stream ends it."""
        await self.data(error_body(error))
        await self._x.send_body(b"", more=False)

    async def done(self) -> None:
        await self._x.send_body(b"data: [DONE]\n\n", more=False)
