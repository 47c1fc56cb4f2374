"""From token bytes to text deltas: whole UTF-8 characters only, stop strings found across token boundaries."""

from __future__ import annotations

import codecs
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass


class TextStream:
    """Decodes one sequence incrementally; the deltas and `flush` joined are the text of all tokens.

    An incomplete UTF-8 character is held back until its last byte; bytes that can never be one become U+FFFD.
    """

    def __init__(self, token_bytes: Callable[[int], bytes], *, strip_first_space: bool = False) -> None:
        self._token_bytes = token_bytes
        self._strip = strip_first_space
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, tokens: Iterable[int]) -> str:
        """The text that is settled once `tokens` follow what came before."""
        data = b"".join(map(self._token_bytes, tokens))
        if self._strip and data:
            self._strip = False
            data = data.removeprefix(b" ")
        return self._decoder.decode(data)

    def flush(self) -> str:
        """What an incomplete last character decodes to; the stream is at its end."""
        return self._decoder.decode(b"", final=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class Stopped:
    """`text` may be shown; `stop` is the stop string that was met, after which nothing more may be."""

    text: str
    stop: str | None = None


class StopMatcher:
    """Cuts a text at the stop string that is complete first, whatever the pieces in which the text arrives.

    It holds back only the longest end of the text that could still become a stop string, so less than the longest one.
    Of two that end at the same character the longer counts. A stop string is no part of the text.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(s for s in dict.fromkeys(stops) if s)
        self._held = ""
        self._hit: str | None = None

    def push(self, delta: str) -> Stopped:
        """Take more text. Once a stop was met, all later text is swallowed."""
        if self._hit is not None:
            return Stopped(text="", stop=self._hit)
        text = self._held + delta
        found = [(at + len(stop), at, stop) for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            _end, at, self._hit = min(found)
            self._held = ""
            return Stopped(text=text[:at], stop=self._hit)
        keep = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - keep :]
        return Stopped(text=text[: len(text) - keep])

    def flush(self) -> str:
        """What was held back, now that no more text comes."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """The length of the longest proper prefix of `stop` that ends `text`."""
    for size in range(min(len(stop) - 1, len(text)), 0, -1):
        if text.endswith(stop[:size]):
            return size
    return 0
