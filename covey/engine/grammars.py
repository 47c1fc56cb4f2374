"""The grammars of requests, compiled in threads of their own: neither the event loop nor a step waits for one."""

from __future__ import annotations

import asyncio
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress

import anyio

from covey.clock import Clock
from covey.errors import InvalidArgument, Overloaded, Unavailable
from covey.model.grammar import CompiledGrammar, GrammarCompiler
from covey.model.plan import RunnerInfo

from .text import Vocabulary

THREADS = 2
COMPILE_S = 10.0
"""A grammar that takes longer is refused; what it has begun runs on, as threads cannot be ended."""
WAITING_MAX = 512


class Grammars:
    """Compiles each grammar once, however many requests ask for it at a time."""

    def __init__(self, vocabulary: Vocabulary, info: RunnerInfo, clock: Clock, *, compile_s: float = COMPILE_S) -> None:
        self._compiler = GrammarCompiler(vocabulary, vocab_size=info.vocab_size, eos_ids=info.eos_ids, clock=clock)
        self._clock = clock
        self._compile_s = compile_s
        self._threads = ThreadPoolExecutor(max_workers=THREADS, thread_name_prefix="grammar")
        self._pending: dict[str, Future[CompiledGrammar]] = {}

    def start(self, text: str, *, timeout_s: float) -> Compilation:
        """Have a grammar compiled. Raises Overloaded when too many are."""
        known = self._pending.get(text)
        if known is None:
            if len(self._pending) >= WAITING_MAX:
                raise Overloaded("too many grammars are being compiled", retry_after_ms=1000)
            known = self._pending[text] = self._threads.submit(self._compiler.compile, text)
            known.add_done_callback(lambda _: self._pending.pop(text, None))
        deadline = self._clock.now() + timeout_s
        return Compilation(known, self._clock, compile_s=self._compile_s, deadline=deadline)

    def close(self) -> None:
        """Let the threads end; what they compile is not waited for."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        self._compiler.close()


class Compilation:
    """A grammar that is being compiled, for one of those who wait for it."""

    def __init__(self, future: Future[CompiledGrammar], clock: Clock, *, compile_s: float, deadline: float) -> None:
        self._future = future
        self._clock = clock
        self._compile_s = compile_s
        self._deadline = deadline
        self._give_up_at = deadline
        self._has_begun = False

    async def wait(self, wait_s: float) -> CompiledGrammar | None:
        """The grammar, or None after `wait_s` seconds without it.

        Raises:
            InvalidArgument: it is no grammar, or takes too long (field `grammar`).
            Overloaded: others took all the time before it.
            Unavailable: the engine stopped.
            Unimplemented: this worker cannot constrain its output.
        """
        if not self._has_begun and self._future.running():
            self._has_begun = True
            self._give_up_at = min(self._deadline, self._clock.now() + self._compile_s)
        left_s = self._give_up_at - self._clock.now()
        if left_s > 0:
            await self._until_done(min(wait_s, left_s))
        if self._future.cancelled():
            raise Unavailable("the engine stopped")
        if self._future.done():
            return self._future.result()
        if left_s > wait_s:
            return None
        if self._has_begun:
            raise InvalidArgument("the grammar takes too long to compile: make it smaller", field="grammar")
        raise Overloaded("too many grammars are being compiled", retry_after_ms=1000)

    async def _until_done(self, wait_s: float) -> None:
        ended = anyio.Event()
        loop = asyncio.get_running_loop()
        self._future.add_done_callback(lambda _: _tell(loop, ended))
        with anyio.move_on_after(wait_s):
            await ended.wait()


def _tell(loop: asyncio.AbstractEventLoop, ended: anyio.Event) -> None:
    with suppress(RuntimeError):  # the loop has been closed: nobody waits
        loop.call_soon_threadsafe(ended.set)
