"""The RPCs of a decode worker: thin, each is a call of the engine."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import aclosing

from covey.codec.methods import Decode, KvStore
from covey.engine.block_events import BlockEvents
from covey.engine.engine import Engine
from covey.net.rpc import Call, Handlers
from covey.types.common import Empty
from covey.types.generate import (
    AdoptReply,
    AdoptRequest,
    CancelRequest,
    EngineInfo,
    EngineLoad,
    Event,
    ExportRequest,
    GenerateRequest,
    HandoverTicket,
    RetainReply,
    RetainRequest,
)
from covey.types.kv import KvSnapshot


class Servicer:
    """Handlers over one engine. It answers `KvStore.Snapshot` too: what its prefix cache holds."""

    def __init__(self, engine: Engine, events: BlockEvents) -> None:
        self._engine = engine
        self._events = events

    def handlers(self) -> Handlers:
        return {
            Decode.INFO: self.info,
            Decode.GENERATE: self.generate,
            Decode.CANCEL: self.cancel,
            Decode.LOAD: self.load,
            Decode.DRAIN: self.drain,
            Decode.RETAIN: self.retain,
            Decode.EXPORT: self.export,
            Decode.ADOPT: self.adopt,
            KvStore.SNAPSHOT: self.snapshot,
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

    async def retain(self, request: RetainRequest, call: Call) -> RetainReply:
        return await self._engine.retain(request, timeout_s=call.remaining_s())

    async def export(self, request: ExportRequest, call: Call) -> HandoverTicket:
        return await self._engine.export(request.request_id, timeout_s=call.remaining_s())

    async def adopt(self, request: AdoptRequest, call: Call) -> AdoptReply:
        return await self._engine.adopt(request, timeout_s=call.remaining_s())

    async def snapshot(self, _: Empty, __: Call) -> KvSnapshot:
        return await self._events.snapshot(self._engine)
