"""The RPCs that prefill and decode workers share: thin, each is a call of the engine."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import aclosing
from dataclasses import asdict

from opentelemetry import trace

from covey.codec.methods import Decode, Prefill
from covey.net.rpc import Call, Handlers
from covey.types.common import Empty
from covey.types.generate import (
    CancelRequest,
    EngineInfo,
    EngineLoad,
    Event,
    Finished,
    GenerateRequest,
    Handover,
    Timings,
)

from .engine import Engine


class EngineServicer:
    """Handlers over one engine."""

    def __init__(self, engine: Engine, methods: type[Prefill | Decode]) -> None:
        self._engine = engine
        self._methods = methods

    def handlers(self) -> Handlers:
        """What to serve."""
        return {
            self._methods.INFO: self.info,
            self._methods.GENERATE: self.generate,
            self._methods.CANCEL: self.cancel,
            self._methods.LOAD: self.load,
            self._methods.DRAIN: self.drain,
        }

    async def info(self, _: Empty, __: Call) -> EngineInfo:
        """What this worker is."""
        return self._engine.info()

    async def generate(self, request: GenerateRequest, _: Call) -> AsyncIterator[Event]:
        """Run a request; the caller's leaving cancels it."""
        async with aclosing(self._engine.generate(request)) as events:
            async for event in events:
                if isinstance(event, Finished | Handover):
                    _note(event.timings)
                yield event

    async def cancel(self, request: CancelRequest, _: Call) -> Empty:
        """End a request."""
        await self._engine.cancel(request.request_id)
        return Empty()

    async def load(self, _: Empty, __: Call) -> EngineLoad:
        """How busy this worker is."""
        return self._engine.load()

    async def drain(self, _: Empty, call: Call) -> Empty:
        """Refuse new requests and wait for those that run."""
        await self._engine.drain(timeout_s=call.remaining_s())
        return Empty()


def _note(timings: Timings) -> None:
    """Write into the call's span where its time went."""
    trace.get_current_span().set_attributes({f"covey.{name}": value for name, value in asdict(timings).items()})
