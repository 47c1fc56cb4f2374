"""Semantic variables: futures of texts, named in a program; and what they are wanted for."""

from __future__ import annotations

from collections.abc import Generator
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import anyio

from covey.codec.methods import Programs
from covey.errors import InvalidArgument
from covey.net.rpc import Replies
from covey.types.program import (
    GetVariable,
    Objective,
    ObjectiveKind,
    VariableDelta,
    VariableEvent,
    VariableValue,
)

if TYPE_CHECKING:
    from contextlib import AbstractAsyncContextManager

    from covey.client.program import Program

TIMEOUT_S = 120.0
MARGIN_S = 5.0


def latency() -> Objective:
    """Want a value as soon as possible."""
    return Objective(kind=ObjectiveKind.LATENCY)


def throughput() -> Objective:
    """Want a value when it suits the whole: as one of many."""
    return Objective(kind=ObjectiveKind.THROUGHPUT)


def ttft(target_s: float) -> Objective:
    """Want the first token within `target_s` seconds."""
    return Objective(kind=ObjectiveKind.TTFT, target_s=target_s)


def tpot(target_s: float) -> Objective:
    """Want each further token within `target_s` seconds."""
    return Objective(kind=ObjectiveKind.TPOT, target_s=target_s)


def deadline(target_s: float) -> Objective:
    """Want the whole value within `target_s` seconds from now."""
    return Objective(kind=ObjectiveKind.DEADLINE, target_s=target_s)


class Variable:
    """A text that will be: pass it to semantic functions, or `await` its value."""

    def __init__(self, program: Program, name: str) -> None:
        self.name = name
        self._program = program

    def __repr__(self) -> str:
        return f"Variable({self.name!r})"

    def __str__(self) -> str:
        raise InvalidArgument(
            f"variable {self.name!r} has no text yet: pass it to a semantic function, or `await` it first",
            field=self.name,
        )

    def __await__(self) -> Generator[Any, None, str]:
        return self.get().__await__()

    def belongs_to(self, program: Program) -> bool:
        return self._program is program

    async def get(self, *, objective: Objective | None = None, timeout_s: float = TIMEOUT_S) -> str:
        """Return the text, waiting for it.

        Raises:
            DeadlineExceeded: it is not there within `timeout_s`; it may be asked for again.
            CoveyError: what the call that produces it failed with.
        """
        return (await self.result(objective=objective, timeout_s=timeout_s)).value

    async def result(self, *, objective: Objective | None = None, timeout_s: float = TIMEOUT_S) -> VariableValue:
        """Return the text with its usage, timings and cache outcome; raises as `get` does."""
        request = await self._request(objective, timeout_s)
        return await self._program.channel.call(Programs.GET, request, timeout_s=timeout_s + MARGIN_S)

    def stream(self, *, objective: Objective | None = None, timeout_s: float = TIMEOUT_S) -> TextStream:
        """Iterate over the text as it comes: `async for piece in variable.stream()`."""
        return TextStream(self, objective, timeout_s)

    async def open(
        self, objective: Objective | None, timeout_s: float
    ) -> AbstractAsyncContextManager[Replies[VariableEvent]]:
        """Start the stream's call; for `TextStream`."""
        request = await self._request(objective, timeout_s)
        return self._program.channel.stream(Programs.STREAM, request, timeout_s=timeout_s + MARGIN_S)

    async def _request(self, objective: Objective | None, timeout_s: float) -> GetVariable:
        if not timeout_s > 0:
            raise InvalidArgument("timeout_s must be positive", field="timeout_s")
        await self._program.submitted(self.name, timeout_s)
        return GetVariable(
            program_id=self._program.program_id, name=self.name, objective=objective or latency(), timeout_s=timeout_s
        )


class TextStream:
    """Pieces of a text. It closes at its end, on an error, at `aclose`, or when its `async with` block ends."""

    def __init__(self, variable: Variable, objective: Objective | None, timeout_s: float) -> None:
        self._variable = variable
        self._objective = objective
        self._timeout_s = timeout_s
        self._call: AbstractAsyncContextManager[Replies[VariableEvent]] | None = None
        self._events: Replies[VariableEvent] | None = None
        self._seen = ""
        self._closed = False
        self.result: VariableValue | None = None
        """The whole value, once the stream has ended."""

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> str:
        if self._closed:
            raise StopAsyncIteration
        try:
            while True:
                piece = await self._next()
                if piece:
                    return piece
        except BaseException:
            await self.aclose()
            raise

    async def _next(self) -> str:
        if self._events is None:
            self._call = await self._variable.open(self._objective, self._timeout_s)
            self._events = await self._call.__aenter__()
        event = await anext(self._events)
        if isinstance(event, VariableDelta):
            self._seen += event.text
            return event.text
        self.result = event
        return event.value[len(self._seen) :] if event.value.startswith(self._seen) else ""

    async def aclose(self) -> None:
        """Stop: the call at the gateway goes on for others, this stream does not."""
        self._closed = True
        call, self._call = self._call, None
        if call is not None:
            with anyio.CancelScope(shield=True):
                await call.__aexit__(None, None, None)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()
