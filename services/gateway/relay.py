"""What a client has of one sequence, whatever workers produced it: nothing lost, nothing twice."""

from __future__ import annotations

from covey.errors import Unavailable
from covey.types.generate import Resume, Tokens
from covey.types.program import Delta


class BrokenStream(Unavailable):
    """A worker skipped tokens or text: it cannot be trusted with the rest."""


class Relay:
    """Accepts the tokens of successive attempts and passes on what continues the client's stream. Sans-I/O."""

    def __init__(self, index: int) -> None:
        self._index = index
        self._ids: list[int] = []
        self._text: list[str] = []
        self._chars = 0
        self.attempt = 0

    @property
    def ids(self) -> tuple[int, ...]:
        return tuple(self._ids)

    @property
    def tokens(self) -> int:
        """How many tokens the client has."""
        return len(self._ids)

    @property
    def text(self) -> str:
        return "".join(self._text)

    def accept(self, tokens: Tokens) -> Delta | None:
        """What the client does not have yet; None for a late event of an attempt that was abandoned, or nothing new.

        Raises:
            BrokenStream: tokens or characters between the last event and this one are missing.
        """
        if tokens.attempt != self.attempt:
            return None
        skip_ids, skip_chars = len(self._ids) - tokens.offset, self._chars - tokens.text_offset
        if skip_ids < 0 or skip_chars < 0:
            raise BrokenStream("the worker skipped tokens")
        ids, text = tokens.ids[skip_ids:], tokens.text[skip_chars:]
        if not ids and not text:
            return None
        self._ids += ids
        self._text.append(text)
        self._chars += len(text)
        return Delta(index=self._index, text=text, ids=ids, logprobs=tokens.logprobs[skip_ids:] if ids else ())

    def resume(self) -> Resume | None:
        """What the next worker must not repeat; None when the client has nothing."""
        return Resume(emitted=self.ids, text_offset=self._chars) if self._ids else None
