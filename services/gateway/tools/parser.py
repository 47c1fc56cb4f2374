"""Function calls found in a model's text while it comes: content passes, calls become deltas of their arguments."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection
from dataclasses import dataclass

from covey.types.program import CallDelta

from .dialect import Dialect

_HEAD = re.compile(r'\s*\{\s*"name"\s*:\s*"(?P<name>[^"\\]{1,64})"\s*,\s*"(?:arguments|parameters)"\s*:\s*')


@dataclass(frozen=True, slots=True, kw_only=True)
class Parsed:
    """What can be passed on."""

    text: str = ""
    calls: tuple[CallDelta, ...] = ()


class _Value:
    """Finds where a JSON value ends, character by character."""

    def __init__(self) -> None:
        self._depth = 0
        self._in_string = False
        self._is_escaped = False
        self._began = False

    def take(self, text: str) -> int:
        """How many characters of `text` belong to the value; fewer than all when it has ended."""
        for i, c in enumerate(text):
            if self._in_string:
                self._string(c)
            elif c == '"':
                self._in_string = self._began = True
            elif c in "{[":
                self._depth += 1
                self._began = True
            elif c in "}]":
                if self._depth == 0:
                    return i  # the bracket around the value
                self._depth -= 1
            elif self._depth == 0 and self._began and c in ", \n\t\r":
                return i
            elif not c.isspace():
                self._began = True
        return len(text)

    def _string(self, c: str) -> None:
        if self._is_escaped:
            self._is_escaped = False
        elif c == "\\":
            self._is_escaped = True
        elif c == '"':
            self._in_string = False


class CallParser:
    """Reads one choice. `names` are the functions there are: what calls another one is content. Sans-I/O."""

    def __init__(self, dialect: Dialect, names: Collection[str], new_id: Callable[[], str], *, several: bool) -> None:
        self._open, self._close = dialect.opening.strip(), dialect.closing.strip()
        self._names = frozenset(names)
        self._new_id = new_id
        self._calls_max = 2**31 if several and dialect.allows_several else 1
        self._buffer = ""
        self._at_start = True
        self._inside = False
        self._value: _Value | None = None
        self._is_closing = False
        self.calls = 0
        """Calls found so far."""

    def push(self, text: str) -> Parsed:
        """Take more text."""
        self._buffer += text
        content: list[str] = []
        found: list[CallDelta] = []
        while self._step(content, found):
            pass
        return Parsed(text="".join(content), calls=tuple(found))

    def finish(self) -> Parsed:
        """What was held back: the text has ended."""
        text, self._buffer = self._buffer, ""
        if self._value is not None:
            return Parsed(calls=self._more(text[: self._value.take(text)]))
        if self._is_closing:
            return Parsed()
        if self._inside:
            whole = self._whole(text)
            return Parsed(calls=(whole,)) if whole is not None else Parsed(text=self._open + text)
        return Parsed(text="" if self.calls and not text.strip() else text)

    def _step(self, content: list[str], found: list[CallDelta]) -> bool:
        """Do one thing; False when more text is needed."""
        if self._value is not None:
            return self._arguments(self._value, found)
        if self._is_closing:
            return self._skip_closing()
        if self._inside:
            return self._begin_call(content, found)
        return self._outside(content)

    def _outside(self, content: list[str]) -> bool:
        if not self._open:
            return self._bare(content)
        at = self._buffer.find(self._open)
        if at >= 0:
            self._pass(content, self._buffer[:at])
            self._buffer = self._buffer[at + len(self._open) :]
            self._inside = True
            return True
        keep = _overlap(self._buffer, self._open)
        keep = len(self._buffer) if self.calls and not self._buffer[: len(self._buffer) - keep].strip() else keep
        self._pass(content, self._buffer[: len(self._buffer) - keep])
        self._buffer = self._buffer[len(self._buffer) - keep :]
        return False

    def _bare(self, content: list[str]) -> bool:
        """Without an opening, an answer that begins with a bracket may be a call."""
        if self._at_start and not self._buffer.strip():
            return False
        if self._at_start and self._buffer.lstrip().startswith("{"):
            self._inside, self._at_start = True, False
            return True
        self._at_start = False
        self._pass(content, self._buffer)
        self._buffer = ""
        return False

    def _pass(self, content: list[str], text: str) -> None:
        """Content; but white space between calls is none."""
        if text and (text.strip() or not self.calls):
            content.append(text)

    def _begin_call(self, content: list[str], found: list[CallDelta]) -> bool:
        head = _HEAD.match(self._buffer)
        is_known = head is not None and head["name"] in self._names and self.calls < self._calls_max
        if head is not None and is_known and head.end() < len(self._buffer):
            found.append(CallDelta(index=self.calls, id=self._new_id(), name=head["name"]))
            self.calls += 1
            self._value = _Value()
            self._inside = False
            self._buffer = self._buffer[head.end() :]
            return True
        end = self._buffer.find(self._close) if self._close else -1
        if end < 0:
            return False
        text, self._buffer = self._buffer[:end], self._buffer[end + len(self._close) :]
        self._inside = False
        whole = self._whole(text)
        if whole is not None:
            found.append(whole)
        elif self.calls < self._calls_max:
            content.append(self._open + text + self._close)
        return True

    def _arguments(self, value: _Value, found: list[CallDelta]) -> bool:
        count = value.take(self._buffer)
        found += self._more(self._buffer[:count])
        ended = count < len(self._buffer)
        self._buffer = self._buffer[count:]
        if ended:
            self._value, self._is_closing = None, True
        return ended

    def _more(self, arguments: str) -> tuple[CallDelta, ...]:
        return (CallDelta(index=self.calls - 1, arguments=arguments),) if arguments else ()

    def _skip_closing(self) -> bool:
        """Drop what stands between the arguments and the end of the call."""
        if not self._close:
            self._buffer = ""  # one call is the whole answer
            return False
        at = self._buffer.find(self._close)
        if at < 0:
            self._buffer = self._buffer[-len(self._close) :]
            return False
        self._buffer = self._buffer[at + len(self._close) :]
        self._is_closing = False
        return True

    def _whole(self, text: str) -> CallDelta | None:
        """A call written in another order, once it is whole."""
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):
            return None
        if not isinstance(value, dict) or value.get("name") not in self._names or self.calls >= self._calls_max:
            return None
        arguments = value.get("arguments", value.get("parameters", {}))
        self.calls += 1
        text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
        return CallDelta(index=self.calls - 1, id=self._new_id(), name=value["name"], arguments=text)


def _overlap(text: str, word: str) -> int:
    """The length of the longest end of `text` that begins `word`."""
    return next((n for n in range(min(len(text), len(word) - 1), 0, -1) if word.startswith(text[-n:])), 0)
