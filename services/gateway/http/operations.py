"""The endpoints beside generation: models, embeddings, tokens, health, metrics, version, the description of all."""

from __future__ import annotations

import base64
import struct
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Final

import prometheus_client

from covey.auth import Principal
from covey.codec.methods import SemCache
from covey.errors import InvalidArgument, NotFound
from covey.net.rpc import Channels
from covey.types.program import EmbedRequest, ModelCard
from services.gateway.job import Prompt
from services.gateway.models import Catalog, LocalModel

from .exchange import Exchange
from .jobs import messages
from .openapi import DOCUMENT
from .schema import EmbeddingsBody, TokenizeBody

EMBED_TIMEOUT_S = 60.0


def _version() -> str:
    try:
        return version("covey")
    except PackageNotFoundError:  # run from a source tree
        return "0"


VERSION: Final = _version()


class Operations:
    """What is not generation."""

    def __init__(
        self,
        *,
        catalog: Catalog,
        channels: Channels,
        registry: prometheus_client.CollectorRegistry,
        created: int,
    ) -> None:
        self._catalog = catalog
        self._channels = channels
        self._registry = registry
        self._created = created
        self.is_draining = False

    async def models(self, x: Exchange, _who: Principal) -> None:
        await x.reply({"object": "list", "data": [self._card(card) for card in self._catalog.cards()]})

    async def model(self, x: Exchange, _who: Principal) -> None:
        name = x.scope["path_params"]["model"]
        card = next((c for c in self._catalog.cards() if c.id == name), None)
        if card is None:
            raise NotFound(f"no model {name!r}", field="model")
        await x.reply(self._card(card))

    async def embeddings(self, x: Exchange, _who: Principal) -> None:
        body = await x.json(EmbeddingsBody)
        address = self._catalog.embedder(body.model)
        inputs = (body.input,) if isinstance(body.input, str) else tuple(body.input)
        if not all(inputs):
            raise InvalidArgument("an input is empty", field="input")
        async with x.while_connected():
            reply = await self._channels.to(address).call(
                SemCache.EMBED, EmbedRequest(model=body.model, inputs=inputs), timeout_s=EMBED_TIMEOUT_S
            )
            encode = _base64 if body.encoding_format == "base64" else list
            data = [
                {"object": "embedding", "index": i, "embedding": encode(v.values)} for i, v in enumerate(reply.vectors)
            ]
            usage = {"prompt_tokens": reply.prompt_tokens, "total_tokens": reply.prompt_tokens}
            await x.reply({"object": "list", "data": data, "model": body.model, "usage": usage})

    async def tokenize(self, x: Exchange, _who: Principal) -> None:
        body = await x.json(TokenizeBody)
        model = self._catalog.find(body.model)
        if not isinstance(model, LocalModel):
            raise InvalidArgument("a remote model's tokenizer is not known here", field="model")
        if (body.prompt is None) == (body.messages is None):
            raise InvalidArgument("send either `prompt` or `messages`", field="prompt")
        if body.messages is not None:
            tokens = list(model.encode(Prompt(messages=messages(body.messages))))
        else:
            tokens = model.tokenizer.encode(body.prompt or "", add_special=body.add_special_tokens)
        limit = self._catalog.context_limit(model)
        await x.reply({"tokens": tokens, "count": len(tokens), "max_model_len": limit})

    async def livez(self, x: Exchange) -> None:
        await x.reply({"status": "alive"})

    async def readyz(self, x: Exchange) -> None:
        """Ready: not draining, and at least one model can be served."""
        if self.is_draining:
            await x.reply({"status": "draining"}, status=503, headers={"retry-after": "5"})
        elif not self._catalog.is_ready():
            await x.reply({"status": "no model has a ready worker"}, status=503, headers={"retry-after": "2"})
        else:
            await x.reply({"status": "ready"})

    async def version(self, x: Exchange) -> None:
        await x.reply({"version": VERSION})

    async def metrics(self, x: Exchange) -> None:
        data = prometheus_client.generate_latest(self._registry)
        await x.reply_bytes(data, prometheus_client.CONTENT_TYPE_LATEST)

    async def openapi(self, x: Exchange) -> None:
        await x.reply(DOCUMENT | {"info": {"title": "Covey", "version": VERSION}})

    def _card(self, card: ModelCard) -> dict[str, Any]:
        return {
            "id": card.id,
            "object": "model",
            "created": self._created,
            "owned_by": "remote" if card.remote else "covey",
            "max_model_len": card.context_limit,
            "covey": {"ready_workers": card.ready_workers, "remote": card.remote, "embedding": card.embedding},
        }


def _base64(values: tuple[float, ...]) -> str:
    """Little-endian float32, as OpenAI's client decodes it."""
    return base64.b64encode(struct.pack(f"<{len(values)}f", *values)).decode()
