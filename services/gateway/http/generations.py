"""`/v1/chat/completions` and `/v1/completions`: whole answers and streams."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import anyio

from covey.auth import Principal
from covey.clock import Clock
from covey.errors import CoveyError
from covey.types.program import ChoiceDone, Completed, CompletionEvent, Delta, Started
from services.gateway.completions import Completions
from services.gateway.config import DispatchSettings
from services.gateway.job import Job
from services.gateway.stream import Completion

from .exchange import Exchange
from .jobs import chat_job, completion_job
from .schema import ChatBody, CompletionBody, StreamOptions
from .shape import ChatShape, Json, Shape, TextShape, covey_json, joined, usage_json
from .sse import EventStream


class Generations:
    """The two endpoints that generate text."""

    def __init__(self, completions: Completions, clock: Clock, settings: DispatchSettings) -> None:
        self._completions = completions
        self._clock = clock
        self._settings = settings

    async def chat(self, x: Exchange, who: Principal) -> None:
        deadline_at = self._clock.now() + self._settings.deadline_s
        body = await x.json(ChatBody)
        job = chat_job(body, x, who, deadline_at)
        await self._answer(x, job, ChatShape(job.params.logprobs), body)

    async def complete(self, x: Exchange, who: Principal) -> None:
        deadline_at = self._clock.now() + self._settings.deadline_s
        body = await x.json(CompletionBody)
        job = completion_job(body, x, who, deadline_at)
        await self._answer(x, job, TextShape(job.params.logprobs), body)

    async def _answer(self, x: Exchange, job: Job, shape: Shape, body: ChatBody | CompletionBody) -> None:
        async with x.while_connected(), self._completions.open(job) as completion:
            if body.stream:
                options = body.stream_options or StreamOptions()
                view = _StreamView(x, completion, shape, has_usage=options.include_usage, has_ids=body.return_token_ids)
                await view.run(self._settings.heartbeat_s)
            else:
                await _collect(x, completion, shape, has_ids=body.return_token_ids)


async def _collect(x: Exchange, completion: Completion, shape: Shape, *, has_ids: bool) -> None:
    deltas: dict[int, list[Delta]] = defaultdict(list)
    done: dict[int, ChoiceDone] = {}
    end: Completed | None = None
    async for event in completion:
        match event:
            case Delta():
                deltas[event.index].append(event)
            case ChoiceDone():
                done[event.index] = event
            case Completed():
                end = event
            case Started():
                pass
    assert end is not None, "a completion ends with Completed or an error"
    wholes = {i: joined(deltas[i], i) for i in done}
    body = _head(completion, shape, shape.kind) | {
        "choices": [
            shape.whole(wholes[i], choice.reason) | _ids(wholes[i].ids, has_ids=has_ids)
            for i, choice in sorted(done.items())
        ],
        "usage": usage_json(end.usage),
        "covey": covey_json(end, x.request_id),
    }
    await x.reply(body, headers=_cache_header(completion))


class _StreamView:
    """One stream: role first, text, finish reasons, usage, `[DONE]`; comments while nothing comes."""

    def __init__(self, x: Exchange, completion: Completion, shape: Shape, *, has_usage: bool, has_ids: bool) -> None:
        self._x = x
        self._completion = completion
        self._shape = shape
        self._has_usage = has_usage
        self._has_ids = has_ids
        self._stream = EventStream(x)
        self._chars: dict[int, int] = defaultdict(int)
        self._held: Json | None = None
        """The last finish: it carries Covey's account when no usage chunk does."""

    async def run(self, heartbeat_s: float) -> None:
        """Send the stream; errors before its first event are raised, later ones are sent as events."""
        began = False
        while True:
            event: CompletionEvent | None = None
            try:
                with anyio.move_on_after(heartbeat_s) as waiting:
                    event = await self._completion.pipe.get()
                if waiting.cancelled_caught:
                    await self._open()
                    await self._stream.heartbeat()
                    continue
            except CoveyError as error:
                if not self._x.is_started:
                    raise
                await self._stream.error(error)
                return
            if event is None:
                await self._stream.done()
                return
            if not began and not isinstance(event, Started):
                began = True
                await self._open()
                await self._roles()
            await self._send(event)

    async def _open(self) -> None:
        await self._stream.open(_cache_header(self._completion))

    async def _roles(self) -> None:
        job = self._completion.job
        for index in range(len(job.prompts) * job.params.n):
            opening = self._shape.opening(index)
            if opening is not None:
                await self._chunk([opening])

    async def _send(self, event: CompletionEvent) -> None:
        match event:
            case Delta() if event.text or event.calls or event.logprobs or self._has_ids:
                await self._flush()
                before = self._chars[event.index]
                self._chars[event.index] += len(event.text)
                choice = self._shape.delta(event, before)
                await self._chunk([choice | _ids(event.ids, has_ids=self._has_ids)])
            case ChoiceDone():
                await self._flush()
                self._held = self._shape.finish(event.index, event.reason)
            case Completed():
                await self._end(event)
            case _:
                pass

    async def _end(self, end: Completed) -> None:
        account = {"covey": covey_json(end, self._x.request_id)}
        if self._has_usage:
            await self._flush()
            await self._chunk([], usage=usage_json(end.usage), extra=account)
        elif self._held is not None:
            held, self._held = self._held, None
            await self._chunk([held], extra=account)

    async def _flush(self) -> None:
        if self._held is not None:
            held, self._held = self._held, None
            await self._chunk([held])

    async def _chunk(self, choices: list[Json], *, usage: Json | None = None, extra: Json | None = None) -> None:
        chunk = _head(self._completion, self._shape, self._shape.chunk_kind) | {"choices": choices}
        if self._has_usage:
            chunk["usage"] = usage
        await self._stream.data(chunk | (extra or {}))


def _ids(ids: Sequence[int], *, has_ids: bool) -> Json:
    return {"token_ids": list(ids)} if has_ids else {}


def _head(completion: Completion, shape: Shape, kind: str) -> dict[str, Any]:
    return {
        "id": f"{shape.prefix}-{completion.job.request_id}",
        "object": kind,
        "created": completion.created,
        "model": completion.model,
    }


def _cache_header(completion: Completion) -> dict[str, str]:
    return {"x-covey-cache": completion.cache.value.lower()}
