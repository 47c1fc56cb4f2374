"""The RPCs of a prefill worker: thin, each is a call of the engine."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import aclosing

from covey.codec.methods import Prefill
from covey.engine.engine import Engine
from covey.net.rpc import Call, Handlers
from covey.types.common import Empty
from covey.types.generate import CancelRequest, EngineInfo, EngineLoad, Event, GenerateRequest


class Servicer:
    """Handlers over one engine."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def handlers(self) -> Handlers:
        return {
            Prefill.INFO: self.info,
            Prefill.GENERATE: self.generate,
            Prefill.CANCEL: self.cancel,
            Prefill.LOAD: self.load,
            Prefill.DRAIN: self.drain,
        }

    async def info(self, _: Empty, __: Call) -> EngineInfo:
        return self._engine.info()

    async def generate(self, request: GenerateRequest, _: Call) -> AsyncIterator[Event]:
        async with aclosing(self._engine.generate(request)) as events:
            async for event in events:
                yield event

    async def cancel(self, request: CancelRequest, _: Call) -> Empty:
        await self._engine.cancel(request.request_id)
        return Empty()

    async def load(self, _: Empty, __: Call) -> EngineLoad:
        return self._engine.load()

    async def drain(self, _: Empty, call: Call) -> Empty:
        await self._engine.drain(timeout_s=call.remaining_s())
        return Empty()
