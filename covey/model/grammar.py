"""Constrained output: grammars compiled for one vocabulary, and the state of one sequence within its grammar."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any, Protocol

import msgspec
import numpy as np

from covey.clock import Clock, MonotonicClock
from covey.errors import FailedPrecondition, InvalidArgument, Overloaded, Unimplemented
from covey.types.grammar import Grammar, GrammarKind, read_grammar

from .json_schema import grammar_of_schema, grammar_tag
from .mask_thread import MaskThread, Words
from .plan import TokenMask

ENTRIES_MAX = 512
BYTES_MAX = 256 << 20
"""What the cache of compiled grammars may hold; a usual schema takes 1 to 5 MB for a vocabulary of 49,152."""

PATIENCE_S = 1.0
"""What the masks of a sequence may take beyond `PATIENCE_PER_TOKEN_S` each. A usual one takes 20 µs, but there are
patterns whose masks take seconds, and a whole batch would wait for them."""
PATIENCE_PER_TOKEN_S = 0.02
PATIENCE_MIN_S = 0.05
_WORD_BITS = 32


class TokenBytes(Protocol):
    """What a grammar needs of a tokenizer."""

    def token_bytes(self, token: int) -> bytes:
        """What a token adds to the text; nothing for a special one."""
        ...


class GrammarCompiler:
    """Compiles grammars for one vocabulary and keeps the latest ones. Thread-safe.

    Close it to end the thread that fills masks.
    """

    def __init__(
        self,
        vocabulary: TokenBytes,
        *,
        vocab_size: int,
        eos_ids: Sequence[int],
        entries_max: int = ENTRIES_MAX,
        bytes_max: int = BYTES_MAX,
        clock: Clock | None = None,
    ) -> None:
        self._vocabulary = vocabulary
        self._vocab_size = vocab_size
        self._eos_ids = tuple(eos_ids)
        self._entries_max = entries_max
        self._bytes_max = bytes_max
        self._lock = threading.Lock()
        self._compiled: OrderedDict[str, CompiledGrammar] = OrderedDict()
        self._size_bytes = 0
        self._compiler: Any = None
        self._clock = clock or MonotonicClock()
        self._filler = MaskThread()

    @property
    def size_bytes(self) -> int:
        """What the kept grammars hold."""
        return self._size_bytes

    def __len__(self) -> int:
        return len(self._compiled)

    def compile(self, text: str) -> CompiledGrammar:
        """The grammar that `text` (see `covey.types.grammar`) describes. Blocks: milliseconds to seconds.

        Raises:
            InvalidArgument: it is no grammar, or one that cannot be enforced (field `grammar`).
            Unimplemented: xgrammar is not installed.
        """
        with self._lock:
            if (known := self._compiled.get(text)) is not None:
                self._compiled.move_to_end(text)
                return known
        grammar = read_grammar(text)
        compiler = self._open()
        inner = _compile(compiler, grammar)
        compiled = CompiledGrammar(
            inner,
            kind=grammar.kind,
            vocab_size=self._vocab_size,
            eos_ids=self._eos_ids,
            filler=self._filler,
            clock=self._clock,
        )
        with self._lock:
            self._keep(text, compiled)
        return compiled

    def close(self) -> None:
        """Let the thread end; masks that are being waited for are still filled."""
        self._filler.close()

    def _open(self) -> Any:
        """The compiler of this vocabulary, made at the first use: it takes a second and some memory."""
        with self._lock:
            if self._compiler is None:
                self._compiler = _xgrammar_compiler(self._vocabulary, self._vocab_size, self._eos_ids)
            return self._compiler

    def _keep(self, text: str, compiled: CompiledGrammar) -> None:
        if (former := self._compiled.pop(text, None)) is not None:
            self._size_bytes -= former.size_bytes
        self._compiled[text] = compiled
        self._size_bytes += compiled.size_bytes
        while self._compiled and (len(self._compiled) > self._entries_max or self._size_bytes > self._bytes_max):
            _, dropped = self._compiled.popitem(last=False)
            self._size_bytes -= dropped.size_bytes


class CompiledGrammar:
    """A grammar that any number of sequences may follow."""

    def __init__(
        self,
        inner: Any,
        *,
        kind: GrammarKind,
        vocab_size: int,
        eos_ids: tuple[int, ...],
        filler: MaskThread,
        clock: Clock,
    ) -> None:
        self._inner = inner
        self._all = _words(range(vocab_size), vocab_size)
        self._stops = _words(eos_ids, vocab_size)
        self._filler = filler
        self._clock = clock
        self._kind = kind
        self.size_bytes = int(inner.memory_size_bytes)

    def start(self, emitted: Sequence[int] = ()) -> GrammarState:
        """A sequence that has `emitted` already.

        Raises:
            InvalidArgument: what was emitted may not be (`resume.emitted`).
            Overloaded: the masks of others take all there is.
        """
        import xgrammar

        if self._filler.is_stuck:
            raise Overloaded("grammars of others take too long", retry_after_ms=5000)
        state = GrammarState(
            xgrammar.GrammarMatcher(self._inner),
            everything=self._all,
            stops=self._stops,
            # A JSON text is complete once, at its end; a pattern may be at every token, and looking costs a mask.
            ends_early=self._kind not in (GrammarKind.REGEX, GrammarKind.EBNF),
            filler=self._filler,
            clock=self._clock,
        )
        try:
            for token in emitted:
                state.advance(token)
        except FailedPrecondition as error:
            raise InvalidArgument(f"does not follow the grammar: {error.message}", field="resume.emitted") from error
        return state


class GrammarState:
    """Where one sequence is in its grammar. One thread moves it on; masks are filled by another, in between."""

    def __init__(
        self,
        matcher: Any,
        *,
        everything: Words,
        stops: Words,
        ends_early: bool,
        filler: MaskThread,
        clock: Clock,
    ) -> None:
        self._matcher = matcher
        self._all = everything
        self._stops = stops
        self._ends_early = ends_early
        self._filler = filler
        self._clock = clock
        self._patience_s = PATIENCE_S
        self._is_too_slow = False
        self._filled: Future[Words] | None = None
        self.is_over = False
        """Whether nothing may follow: the end of text was drawn, or is all that could be."""

    def mask(self, *, may_end: bool = True) -> TokenMask:
        """What may be drawn next, being filled from now on; the end of text only where it may end or must."""
        if self._filled is None:
            self._filled = self._filler.submit(self._fill)
        return _Mask(self, self._stops if not may_end else None)

    def words(self) -> Words:
        """Wait for the mask. One that takes too long leaves all to be drawn: `advance` then says what is wrong."""
        assert self._filled is not None, "asked through a mask, which began the fill"
        words = (
            self._filler.wait(self._filled, self._fill, max(PATIENCE_MIN_S, self._patience_s))
            if not self._is_too_slow
            else None
        )
        if words is None:
            self._is_too_slow = True
            return self._all
        return words

    def advance(self, token: int) -> None:
        """Move on by a drawn token.

        Raises FailedPrecondition when it may not follow, as the grammar has a dead end, or its masks take too long.
        """
        if self._is_too_slow:  # the matcher is still being looked at
            raise FailedPrecondition("the grammar takes too long for each token: make it simpler", field="grammar")
        self._filled = None
        if self.is_over or not self._matcher.accept_token(token):
            raise FailedPrecondition(f"no token of this model continues the grammar (token {token})", field="grammar")
        self.is_over = self._matcher.is_terminated() or (self._ends_early and self._must_end())

    def _must_end(self) -> bool:
        """Whether nothing but the end of text may follow."""
        if not self._matcher.is_completed():
            return False
        self._filled = Future()
        self._filled.set_result(self._fill())
        return not np.any(self._filled.result() & ~self._stops)

    def _fill(self) -> Words:
        """The mask; of a dead end, where nothing may follow, all tokens: `advance` then says what is wrong."""
        began = self._clock.now()
        words = self._all[None].copy()
        if self._matcher.fill_next_token_bitmask(words, 0):
            words &= self._all
        took_s = self._clock.now() - began
        self._patience_s = min(PATIENCE_S, self._patience_s + PATIENCE_PER_TOKEN_S - took_s)
        if not words.any():
            return self._stops if self._matcher.is_completed() else self._all
        found: Words = words[0]
        return found


class _Mask:
    """A mask that is being filled; `banned` are left out unless nothing else is allowed."""

    def __init__(self, state: GrammarState, banned: Words | None) -> None:
        self._state = state
        self._banned = banned

    def words(self) -> Words:
        words = self._state.words()
        if self._banned is None:
            return words
        rest: Words = words & ~self._banned
        return rest if rest.any() else words


def _words(tokens: Sequence[int], vocab_size: int) -> Words:
    """The mask that allows just these tokens."""
    bits = np.zeros(-(-vocab_size // _WORD_BITS) * _WORD_BITS, np.uint8)
    bits[list(tokens)] = 1
    found: Words = np.packbits(bits, bitorder="little").view(np.int32)
    return found


def _xgrammar_compiler(vocabulary: TokenBytes, vocab_size: int, eos_ids: tuple[int, ...]) -> Any:
    try:
        import xgrammar
    except ImportError as error:
        raise Unimplemented("no xgrammar here: pip install 'covey[engine]'", field="grammar") from error
    # A token without bytes, such as a special one, matches no grammar.
    tokens = [vocabulary.token_bytes(i) for i in range(vocab_size)]
    info = xgrammar.TokenizerInfo(tokens, xgrammar.VocabType.RAW, vocab_size=vocab_size, stop_token_ids=list(eos_ids))
    return xgrammar.GrammarCompiler(info, max_threads=1, cache_enabled=False)


def _compile(compiler: Any, grammar: Grammar) -> Any:
    body = grammar.body
    try:
        match grammar.kind:
            case GrammarKind.JSON_OBJECT:
                return compiler.compile_grammar(grammar_of_schema({"type": "object"}, is_closed=False))
            case GrammarKind.JSON_SCHEMA:
                return compiler.compile_grammar(grammar_of_schema(body))
            case GrammarKind.REGEX:
                return compiler.compile_regex(body)
            case GrammarKind.EBNF:
                return compiler.compile_grammar(body)
            case GrammarKind.STRUCTURAL_TAG:
                return compiler.compile_structural_tag(msgspec.json.encode(grammar_tag(body)).decode())
    except (RuntimeError, ValueError, TypeError) as error:
        raise InvalidArgument(f"{grammar.kind}: {_reason(error)}", field="grammar") from error


def _reason(error: Exception) -> str:
    """What xgrammar found, without the file and line of its source."""
    text = str(error).strip()
    text = text.split("] ", 1)[-1] if text.startswith("[") else text
    place, _, rest = text.partition(": ")
    return (rest if ".cc:" in place else text)[:500]
