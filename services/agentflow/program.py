"""A run's program at the gateway: opened once, fed with calls and values, opened again when the gateway forgot it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from random import Random
from typing import Any, Protocol, TypeVar

import anyio

from covey.clock import Clock
from covey.codec.methods import Programs, Unary
from covey.errors import AlreadyExists, CoveyError, DeadlineExceeded
from covey.net.rpc import Channel
from covey.retry import Backoff
from covey.types.ids import CallId, ProgramId, RunId, TenantId
from covey.types.program import (
    AckValues,
    CancelCalls,
    GetVariable,
    Objective,
    OpenProgram,
    ProgramRequest,
    SemanticCall,
    SetVariable,
    SubmitCalls,
    VariableValue,
)
from services.agentflow.gatekeeper import TENANT_HEADER

Q = TypeVar("Q")
R = TypeVar("R")

CALL_TIMEOUT_S = 30.0
GET_TIMEOUT_S = 60.0
"""One wait for a value; the wait is repeated for as long as the node may run."""
GET_MARGIN_S = 5.0
CHUNK_CHARS = 1024**2
"""Texts in one request; a message holds 4 MiB."""
TTL_S = 3600.0
"""The gateway forgets a program that nobody asked about for so long; a run that goes on opens it anew."""


class Gateways(Protocol):
    """Where the gateway is now."""

    def channel(self) -> Channel:
        """Raise `Unavailable` when no gateway is known."""
        ...


class Program:
    """What is known to the gateway of one run. `lives` counts how often the program had to be opened anew."""

    def __init__(
        self, gateways: Gateways, *, run_id: RunId, tenant: TenantId, patience_s: float, clock: Clock, rng: Random
    ) -> None:
        self._gateways = gateways
        self._run_id = run_id
        self._headers = {TENANT_HEADER: tenant}
        self._patience_s = patience_s
        self._clock = clock
        self._rng = rng
        self._id = ProgramId("")
        self._known: set[str] = set()
        self._lock = anyio.Lock()
        self.lives = 0

    @property
    def opened(self) -> bool:
        return bool(self._id)

    def knows(self, name: str) -> bool:
        """Whether the program has the variable, or a call that will set it."""
        return name in self._known

    async def reopen(self, seen_lives: int, deadline_s: float) -> bool:
        """Open the program, or find out whether it still is the one that `seen_lives` stands for.

        Returns True when calls have to be submitted again. Waits for a gateway that is gone, up to the patience.
        """
        async with self._lock:
            if self.lives != seen_lives:
                return True
            request = OpenProgram(idempotency_key=self._run_id, deadline_s=max(deadline_s, 0.001), ttl_s=TTL_S)
            handle = await self._patiently(partial(self._call, Programs.OPEN, request))
            if handle.program_id == self._id:
                return False
            self._id = handle.program_id
            self._known.clear()
            self.lives += 1
            return True

    async def submit(self, calls: Sequence[SemanticCall], values: Mapping[str, str]) -> None:
        """Give the program values that it lacks, then calls, in order."""
        async with self._lock:
            fresh = {name: text for name, text in values.items() if name not in self._known}
            for request in self._requests(calls, fresh):
                try:
                    await self._patiently(partial(self._call, Programs.SUBMIT, request))
                except AlreadyExists:  # an earlier attempt, or an earlier process, set some of the values
                    for name, text in request.variables.items():
                        await self._set(name, text)
                    await self._patiently(partial(self._call, Programs.SUBMIT, replace(request, variables={})))
            self._known.update(values, (call.output for call in calls))

    async def get(self, name: str, objective: Objective) -> VariableValue:
        """Wait for a value, for as long as it takes. Raises what its call failed with."""
        while True:
            began = self._clock.now()
            request = GetVariable(program_id=self._id, name=name, objective=objective, timeout_s=GET_TIMEOUT_S)
            try:
                return await self._call(Programs.GET, request, timeout_s=GET_TIMEOUT_S + GET_MARGIN_S)
            except DeadlineExceeded:
                if self._clock.now() - began < GET_TIMEOUT_S - GET_MARGIN_S:
                    raise  # the call's own deadline, not that of our wait; late ones are told apart by asking again

    async def ack(self, names: Sequence[str]) -> None:
        """Let the gateway forget values that are journaled; a lost one costs it memory until the program closes."""
        await self._best_effort(Programs.ACK, AckValues(program_id=self._id, names=tuple(names)))

    async def cancel(self, calls: Sequence[CallId] = ()) -> None:
        """Cancel some calls, or all without any named; returns when decoding has stopped."""
        await self._best_effort(Programs.CANCEL, CancelCalls(program_id=self._id, calls=tuple(calls)))

    async def close(self) -> None:
        """Let the gateway forget the program."""
        await self._best_effort(Programs.CLOSE, ProgramRequest(program_id=self._id))

    async def _set(self, name: str, text: str) -> None:
        request = SetVariable(program_id=self._id, name=name, value=text)
        try:
            await self._patiently(partial(self._call, Programs.SET, request))
        except AlreadyExists:
            pass

    def _requests(self, calls: Sequence[SemanticCall], values: Mapping[str, str]) -> Iterator[SubmitCalls]:
        """Split what is too large for one message; values come before the calls that name them."""
        chunk: list[SemanticCall] = []
        variables: dict[str, str] = {}
        chars = 0
        items: list[tuple[int, SemanticCall | str]] = [(len(text), name) for name, text in values.items()]
        items += [(sum(len(m.content) for m in call.messages) + 256, call) for call in calls]
        for size, item in items:
            if chars and chars + size > CHUNK_CHARS:
                yield SubmitCalls(program_id=self._id, calls=tuple(chunk), variables=variables)
                chunk, variables, chars = [], {}, 0
            if isinstance(item, str):
                variables[item] = values[item]
            else:
                chunk.append(item)
            chars += size
        if chunk or variables:
            yield SubmitCalls(program_id=self._id, calls=tuple(chunk), variables=variables)

    async def _patiently(self, attempt: Callable[[], Awaitable[R]]) -> R:
        """Repeat while the gateway is gone or too busy, up to the patience; all these calls are idempotent."""
        until = self._clock.now() + self._patience_s
        tries = 0
        while True:
            try:
                return await attempt()
            except CoveyError as error:
                if not error.retryable or self._clock.now() >= until:
                    raise
                await anyio.sleep(Backoff().delay_s(tries, self._rng, retry_after_ms=error.retry_after_ms))
                tries += 1

    async def _call(self, method: Unary[Q, R], request: Q, *, timeout_s: float = CALL_TIMEOUT_S) -> R:
        channel = self._gateways.channel()
        return await channel.call(method, request, timeout_s=timeout_s, headers=self._headers)

    async def _best_effort(self, method: Unary[Q, Any], request: Q) -> None:
        if not self._id:
            return
        try:
            await self._call(method, request)
        except CoveyError:
            return
