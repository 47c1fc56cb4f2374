"""`Inference` over gRPC: the same requests as over HTTP."""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator
from dataclasses import replace

from covey.clock import Clock
from covey.codec.methods import Inference, SemCache
from covey.errors import InvalidArgument
from covey.net.rpc import Call, Channels, Handlers
from covey.types.common import Empty
from covey.types.grammar import read_grammar
from covey.types.ids import RequestId
from covey.types.program import (
    ChatRequest,
    CompleteRequest,
    CompletionEvent,
    EmbedReply,
    EmbedRequest,
    ModelList,
    ToolChoice,
)
from services.gateway.completions import Completions
from services.gateway.job import Job, Prompt
from services.gateway.models import Catalog
from services.gateway.programs.intake import ROLES
from services.gateway.tools.forced import check_tooling

from .credentials import tenant_of

EMBED_TIMEOUT_S = 60.0


class InferenceServicer:
    """Handlers of `Inference`."""

    def __init__(
        self,
        *,
        completions: Completions,
        catalog: Catalog,
        channels: Channels,
        clock: Clock,
        deadline_s: float,
    ) -> None:
        self._completions = completions
        self._catalog = catalog
        self._channels = channels
        self._clock = clock
        self._deadline_s = deadline_s

    def handlers(self) -> Handlers:
        return {
            Inference.CHAT: self.chat,
            Inference.COMPLETE: self.complete,
            Inference.EMBED: self.embed,
            Inference.MODELS: self.models,
        }

    async def chat(self, request: ChatRequest, call: Call) -> AsyncIterator[CompletionEvent]:
        if not request.messages:
            raise InvalidArgument("a conversation needs at least one message", field="messages")
        for i, message in enumerate(request.messages):
            if message.role not in ROLES:
                raise InvalidArgument(f"no role {message.role!r}", field=f"messages[{i}].role")
        tooling = request.tooling
        if tooling is not None:
            check_tooling(tooling)
            if request.params.grammar:
                raise InvalidArgument("a grammar and tools exclude each other", field="params.grammar")
            tooling = None if tooling.choice is ToolChoice.NONE else tooling
        prompt = Prompt(messages=request.messages, tools=tooling.tools if tooling is not None else ())
        job = replace(self._job(request, prompt, call), tooling=tooling)
        async with self._completions.open(job) as completion:
            async for event in completion:
                yield event

    async def complete(self, request: CompleteRequest, call: Call) -> AsyncIterator[CompletionEvent]:
        async with self._completions.open(self._job(request, Prompt(text=request.prompt), call)) as completion:
            async for event in completion:
                yield event

    async def embed(self, request: EmbedRequest, call: Call) -> EmbedReply:
        address = self._catalog.embedder(request.model)
        return await self._channels.to(address).call(SemCache.EMBED, request, timeout_s=call.within(EMBED_TIMEOUT_S))

    async def models(self, _request: Empty, _call: Call) -> ModelList:
        return ModelList(models=self._catalog.cards())

    def _job(self, request: ChatRequest | CompleteRequest, prompt: Prompt, call: Call) -> Job:
        if request.params.grammar:
            read_grammar(request.params.grammar)
        wanted_s = min(request.deadline_s or self._deadline_s, call.remaining_s())
        return Job(
            request_id=RequestId(f"{call.request_id[:64]}-{secrets.token_hex(4)}"),
            tenant=tenant_of(call),
            model=request.model,
            prompts=(prompt,),
            params=request.params,
            cache=request.cache,
            max_age_s=request.cache_max_age_s,
            deadline_at=self._clock.now() + wanted_s,
        )
