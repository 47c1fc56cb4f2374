"""The models of this mesh by public name, each with its tokenizer, or the URL where it is served."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from covey.errors import ContextLengthExceeded, InvalidArgument, NotFound, Unavailable
from covey.types.generate import Role
from covey.types.program import ModelCard

from .config import ModelConfig
from .fleet import Fleet
from .job import Prompt
from .tools.dialect import HERMES, Dialect, dialect_of, native_turns, plain_turns, tool_json


class Tokenizes(Protocol):
    """What the gateway needs of `covey.model.tokenizer.Tokenizer`."""

    context_limit: int
    hash: str
    vocab_size: int

    @property
    def chat_template(self) -> str: ...
    @property
    def supports_tools(self) -> bool: ...
    def encode(self, text: str, *, add_special: bool = True) -> list[int]: ...
    def encode_chat(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] | None = None
    ) -> list[int]: ...
    def decode(self, tokens: Sequence[int], *, skip_special: bool = True) -> str: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalModel:
    """A model that workers of this mesh serve."""

    name: str
    tokenizer: Tokenizes

    @property
    def dialect(self) -> Dialect:
        """How it writes function calls."""
        return dialect_of(self.tokenizer.chat_template) if self.tokenizer.supports_tools else HERMES

    def encode(self, prompt: Prompt) -> tuple[int, ...]:
        """Tokens of a prompt. Raises InvalidArgument when it is empty or names unknown tokens."""
        if prompt.messages:
            ids = self._encode_chat(prompt)
        elif prompt.ids is not None:
            if any(not 0 <= i < self.tokenizer.vocab_size for i in prompt.ids):
                raise InvalidArgument(f"token ids must be below {self.tokenizer.vocab_size}", field="prompt")
            ids = list(prompt.ids)
        else:
            ids = self.tokenizer.encode(prompt.text or "")
        if not ids:
            raise InvalidArgument("the prompt is empty", field=prompt.field)
        return tuple(ids)

    def _encode_chat(self, prompt: Prompt) -> list[int]:
        if self.tokenizer.supports_tools:
            return self.tokenizer.encode_chat(
                native_turns(prompt.messages), [tool_json(t) for t in prompt.tools] or None
            )
        return self.tokenizer.encode_chat(plain_turns(prompt.messages, prompt.tools))

    def check_length(self, prompt_tokens: int, max_tokens: int | None, limit: int, field: str) -> None:
        """Raise ContextLengthExceeded unless prompt and answer fit into `limit` tokens."""
        wanted = max_tokens or 1
        if prompt_tokens + wanted > limit:
            raise ContextLengthExceeded(
                f"this model's maximum context length is {limit} tokens; you asked for {prompt_tokens + wanted} "
                f"({prompt_tokens} in the {field}, {wanted} in the completion): shorten the {field} or max_tokens",
                field=field,
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class RemoteModel:
    """A model at an OpenAI-compatible URL. `api_key` never appears in a representation."""

    name: str
    url: str
    remote_name: str
    context_limit: int


Model = LocalModel | RemoteModel


class Catalog:
    """What can be asked for."""

    def __init__(self, models: Sequence[Model], *, default: str, fleet: Fleet) -> None:
        self._models = {m.name: m for m in models}
        self._default = default or (models[0].name if models else "")
        self._fleet = fleet

    def find(self, name: str) -> Model:
        """The model of that name; an empty name means the default. Raises NotFound (field `model`)."""
        model = self._models.get(name or self._default)
        if model is None:
            known = ", ".join(self._models)
            raise NotFound(f"no model {name!r}; there are: {known}", field="model")
        return model

    def embedder(self, name: str) -> str:
        """The address that embeds with model `name`.

        Raises:
            NotFound: no such embedding model (field `model`).
            Unavailable: nothing embeds at present.
        """
        embedders = self._fleet.embedders()
        if not embedders:
            raise Unavailable("no semcache is there to embed", field="model", retry_after_ms=2000)
        if name not in embedders:
            raise NotFound(f"no embedding model {name!r}; there are: {', '.join(embedders)}", field="model")
        return embedders[name]

    def context_limit(self, model: Model) -> int:
        """What fits at every ready worker of the model."""
        if isinstance(model, RemoteModel):
            return model.context_limit
        infos = [i for r in (Role.DECODE, Role.PREFILL) for _, i in self._fleet.engines(model.name, r)]
        return min((i.context_limit for i in infos), default=model.tokenizer.context_limit)

    def cards(self) -> tuple[ModelCard, ...]:
        """All models, with how many decode workers serve each."""
        text = [
            ModelCard(
                id=name,
                context_limit=self.context_limit(model),
                ready_workers=1 if isinstance(model, RemoteModel) else len(self._fleet.engines(name, Role.DECODE)),
                remote=isinstance(model, RemoteModel),
            )
            for name, model in self._models.items()
        ]
        vectors = [ModelCard(id=n, context_limit=0, ready_workers=1, embedding=True) for n in self._fleet.embedders()]
        return (*text, *vectors)

    def is_ready(self) -> bool:
        """Whether any model can be served now."""
        return any(card.ready_workers for card in self.cards() if not card.embedding)


def open_models(configs: Sequence[ModelConfig]) -> list[Model]:
    """Load every tokenizer. Blocks; raises InvalidArgument or DataCorrupt for a source that is not there."""
    from covey.model.tokenizer import open_tokenizer  # its import takes a while: only where it is needed

    models: list[Model] = []
    for config in configs:
        if config.url:
            remote = RemoteModel(
                name=config.name,
                url=config.url.rstrip("/"),
                remote_name=config.remote_name or config.name,
                context_limit=config.context_limit,
            )
            models.append(remote)
        else:
            models.append(LocalModel(name=config.name, tokenizer=open_tokenizer(config.source or config.name)))
    return models
