"""The RPCs that only a decode worker has: thin, each is a call of the engine."""

from __future__ import annotations

from collections.abc import AsyncIterator

from covey.codec.methods import Decode, KvStore
from covey.engine.block_events import BlockEvents
from covey.engine.engine import Engine
from covey.engine.servicer import EngineServicer
from covey.net.rpc import Call, Handlers
from covey.types.common import Empty
from covey.types.generate import AdoptReply, AdoptRequest, ExportRequest, HandoverTicket, RetainReply, RetainRequest
from covey.types.kv_state import KvSnapshot
from covey.types.lend import AttendReply, AttendRequest, LendChunk, LendReply, ReturnRequest


class Servicer(EngineServicer):
    """Handlers over one engine. It answers `KvStore.Snapshot` too: what its prefix cache holds."""

    def __init__(self, engine: Engine, events: BlockEvents) -> None:
        super().__init__(engine, Decode)
        self._events = events

    def handlers(self) -> Handlers:
        return {
            **super().handlers(),
            Decode.RETAIN: self.retain,
            Decode.EXPORT: self.export,
            Decode.ADOPT: self.adopt,
            Decode.LEND: self.lend,
            Decode.ATTEND: self.attend,
            Decode.RETURN: self.take_back,
            KvStore.SNAPSHOT: self.snapshot,
        }

    async def retain(self, request: RetainRequest, call: Call) -> RetainReply:
        return await self._engine.retain(request, timeout_s=call.remaining_s())

    async def export(self, request: ExportRequest, call: Call) -> HandoverTicket:
        return await self._engine.export(request.request_id, timeout_s=call.remaining_s())

    async def adopt(self, request: AdoptRequest, call: Call) -> AdoptReply:
        return await self._engine.adopt(request, timeout_s=call.remaining_s())

    async def lend(self, chunks: AsyncIterator[LendChunk], _: Call) -> LendReply:
        return await self._engine.creditor.lend(chunks)

    async def attend(self, request: AttendRequest, _: Call) -> AttendReply:
        return await self._engine.creditor.attend(request)

    async def take_back(self, request: ReturnRequest, _: Call) -> Empty:
        self._engine.creditor.take_back(request)
        return Empty()

    async def snapshot(self, _: Empty, __: Call) -> AsyncIterator[KvSnapshot]:
        yield await self._events.snapshot(self._engine)
