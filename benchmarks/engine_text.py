"""The text that engines are measured on, as token ids of the model."""

from __future__ import annotations

from pathlib import Path

from benchmarks.prompts import chat_prompts
from covey.model.source import ModelSource
from covey.model.tokenizer import open_tokenizer


def text_tokens(source: ModelSource, data: Path | None) -> list[int]:
    """The prompts of `benchmarks.prompts`, one after the other."""
    return list(open_tokenizer(source).encode("\n\n".join(chat_prompts(data))))
