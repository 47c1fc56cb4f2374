"""The text of one request: token bytes to whole characters, stop strings withheld, offsets that survive a migration."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from covey.model.text_stream import StopMatcher, TextStream


class Vocabulary(Protocol):
    """What the engine needs of a tokenizer."""

    def token_bytes(self, token: int) -> bytes:
        """What a token adds to the text; nothing for a special one."""
        ...

    def text_stream(self) -> TextStream:
        """A new incremental decoder."""
        ...


class TextPipe:
    """Turns tokens into text deltas. Replaying the tokens of another worker brings it into that worker's state."""

    def __init__(self, vocabulary: Vocabulary, stops: Sequence[str], *, min_tokens: int, sent: int = 0) -> None:
        """`sent` characters are with the client already; stop strings count from the `min_tokens`-th token on."""
        self._stream = vocabulary.text_stream()
        self._matcher = StopMatcher(stops)
        self._min_tokens = min_tokens
        self._tokens = 0
        self._settled = 0
        self._sent = sent
        self._pending = ""
        self.is_stopped = False
        """Whether a stop string was met."""

    def push(self, token: int) -> None:
        """Add a generated token."""
        self._tokens += 1
        self._settle(self._stream.push((token,)))

    def finish(self) -> None:
        """Add what was held back: no token comes any more."""
        self._settle(self._stream.flush())
        self._add(self._matcher.flush())

    def take(self) -> tuple[str, int]:
        """The text that is new, and how many characters come before it."""
        text, self._pending = self._pending, ""
        offset, self._sent = self._sent, self._sent + len(text)
        return text, offset

    @property
    def offset(self) -> int:
        """Characters given out so far."""
        return self._sent

    def _settle(self, delta: str) -> None:
        if self._tokens < self._min_tokens:
            self._add(delta)
            return
        found = self._matcher.push(delta)
        self.is_stopped = found.stop is not None
        self._add(found.text)

    def _add(self, text: str) -> None:
        known = max(0, min(len(text), self._sent - self._settled))
        self._settled += len(text)
        self._pending += text[known:]
