"""Text to tokens and back, and the chat template; loads without torch, from the model's own files."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers

from covey.errors import InvalidArgument

from . import gguf_tokenizer
from .chat_template import ChatTemplate
from .source import ModelSource, read_json, resolve
from .text_stream import TextStream

_BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")


class Tokenizer:
    """The tokenizer of one model. Thread-safe for reading; `hash` names its exact behaviour and is part of every KV
    namespace.
    """

    def __init__(
        self,
        inner: tokenizers.Tokenizer,
        *,
        template: ChatTemplate | None,
        eos_ids: tuple[int, ...],
        context_limit: int,
    ) -> None:
        self._inner = inner
        self._template = template
        self.eos_ids = eos_ids
        self.context_limit = context_limit
        serialised = inner.to_str()
        self.hash = hashlib.blake2b(serialised.encode(), digest_size=16).hexdigest()
        self.vocab_size: int = inner.get_vocab_size()
        parsed = json.loads(serialised)
        self._byte_level = '"ByteLevel"' in json.dumps(parsed["decoder"])
        self._special = frozenset(t["id"] for t in parsed["added_tokens"] if t["special"])

    @property
    def supports_chat(self) -> bool:
        """Whether the model comes with a chat template."""
        return self._template is not None

    @property
    def chat_template(self) -> str:
        """The text of the chat template, or nothing."""
        return self._template.source if self._template is not None else ""

    @property
    def supports_tools(self) -> bool:
        """Whether the chat template has a place for tools."""
        return self._template is not None and self._template.supports_tools

    def encode(self, text: str, *, add_special: bool = True) -> list[int]:
        """Tokens of `text`; `add_special` lets the model's own rule add a beginning-of-text token (not for rendered
        chats).
        """
        ids: list[int] = self._inner.encode(text, add_special_tokens=add_special).ids
        return ids

    def decode(self, tokens: Iterable[int], *, skip_special: bool = True) -> str:
        """Text of `tokens`."""
        text: str = self._inner.decode(list(tokens), skip_special_tokens=skip_special)
        return text

    def token_bytes(self, token: int) -> bytes:
        """What one token adds to the text: nothing for a special one or an id outside the vocabulary."""
        name = None if token in self._special else self._inner.id_to_token(token)
        if name is None:
            return b""
        if self._byte_level:
            try:
                return bytes([_BYTES[c] for c in name])
            except KeyError:  # an added token is stored as plain text
                return name.encode()
        match = _BYTE_TOKEN.fullmatch(name)
        return bytes([int(match[1], 16)]) if match else name.replace("\u2581", " ").encode()

    def text_stream(self) -> TextStream:
        """A new incremental decoder for one sequence of generated tokens."""
        return TextStream(self.token_bytes, strip_first_space=not self._byte_level)

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
    ) -> str:
        """The prompt text of a conversation. Raises InvalidArgument (`model`, `messages` or `tools`)."""
        if self._template is None:
            raise InvalidArgument("this model has no chat template; use plain completions", field="model")
        return self._template.render(messages, tools=tools, add_generation_prompt=add_generation_prompt)

    def encode_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
    ) -> list[int]:
        """Tokens of a conversation: `apply_chat_template`, then `encode` without further special tokens."""
        return self.encode(self.apply_chat_template(messages, tools, add_generation_prompt), add_special=False)


def open_tokenizer(model: str | ModelSource) -> Tokenizer:
    """Load the tokenizer of a model name or path (see `source.resolve`). Raises InvalidArgument, DataCorrupt."""
    source = resolve(model) if isinstance(model, str) else model
    return _from_gguf(source) if source.kind == "gguf" else _from_folder(source)


def _from_gguf(source: ModelSource) -> Tokenizer:
    config = source.config()
    meta = source.gguf().meta
    names: list[str] = meta.get("tokenizer.ggml.tokens", [])
    special = {
        key: names[meta[f"tokenizer.ggml.{key[:3]}_token_id"]]
        for key in ("bos_token", "eos_token")
        if f"tokenizer.ggml.{key[:3]}_token_id" in meta
    }
    template = meta.get("tokenizer.chat_template")
    return Tokenizer(
        gguf_tokenizer.build(meta),
        template=ChatTemplate(template, special_tokens=special) if template else None,
        eos_ids=config.eos_ids,
        context_limit=config.context_limit,
    )


def _from_folder(source: ModelSource) -> Tokenizer:
    path = source.path / "tokenizer.json"
    try:
        inner = tokenizers.Tokenizer.from_str(path.read_text(encoding="utf-8"))
    except Exception as error:  # the Rust binding raises bare Exception
        raise InvalidArgument(f"{path} is not a tokenizer: {error}", field="model") from error
    settings_path = source.path / "tokenizer_config.json"
    settings = read_json(settings_path) if settings_path.is_file() else {}
    special = {key: _content(settings[key]) for key in ("bos_token", "eos_token") if settings.get(key)}
    template = _template_text(source.path, settings)
    config = source.config()
    return Tokenizer(
        inner,
        template=ChatTemplate(template, special_tokens=special) if template else None,
        eos_ids=config.eos_ids,
        context_limit=config.context_limit,
    )


def _content(value: Any) -> str:
    return str(value["content"]) if isinstance(value, dict) else str(value)


def _template_text(folder: Path, settings: Mapping[str, Any]) -> str | None:
    file = folder / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    value = settings.get("chat_template")
    if isinstance(value, list):
        named = {entry["name"]: entry["template"] for entry in value}
        value = named.get("default")
    return str(value) if value else None


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-ins for the 256 bytes."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    table = {chr(b): b for b in printable}
    rest = [b for b in range(256) if b not in set(printable)]
    return table | {chr(256 + i): b for i, b in enumerate(rest)}


_BYTES = _byte_alphabet()
