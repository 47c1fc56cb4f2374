"""Models at OpenAI-compatible URLs: passed on, streamed, their usage and errors translated."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Mapping
from typing import Any

import anyio
import httpx

from covey.clock import Clock
from covey.errors import (
    CoveyError,
    DeadlineExceeded,
    InvalidArgument,
    NotFound,
    Overloaded,
    QuotaExceeded,
    Unavailable,
)
from covey.types.generate import FinishReason, Timings, Usage
from covey.types.grammar import GrammarKind, read_grammar
from covey.types.ids import WorkerId
from covey.types.program import (
    CacheOutcome,
    CallDelta,
    CallParams,
    ChoiceDone,
    Delta,
    Message,
    ToolChoice,
    Tooling,
)

from .job import Job, Outcome
from .models import RemoteModel
from .stream import Completion
from .tools.dialect import tool_json

CONNECT_S = 5.0
READ_GAP_S = 60.0
"""Longest silence of a remote stream; others' servers send no signs of life."""
LINE_CHARS_MAX = 1_048_576

_REASONS = {
    "stop": FinishReason.STOP,
    "length": FinishReason.LENGTH,
    "tool_calls": FinishReason.TOOL_CALLS,
    "content_filter": FinishReason.STOP,
}
_PARAMS = (
    "temperature", "top_p", "top_k", "min_p", "seed", "presence_penalty", "frequency_penalty",
    "repetition_penalty", "min_tokens",
)  # fmt: skip


class RemoteModels:
    """Runs requests at other servers. Never retried: they may have been charged for."""

    def __init__(self, client: httpx.AsyncClient, keys: Mapping[str, str], clock: Clock) -> None:
        """`keys` are API keys by model name."""
        self._client = client
        self._keys = keys
        self._clock = clock

    async def run(self, completion: Completion, model: RemoteModel) -> Outcome:
        """Stream a request's answer into its completion.

        Raises:
            InvalidArgument: several prompts, token prompts, log-probabilities, or what the remote refuses.
            Unavailable: it cannot be reached or broke off.
            Overloaded: it has no room (`QuotaExceeded`: our key's limit).
            DeadlineExceeded: the request's time ran out.
        """
        job = completion.job
        body = _body(job, model)
        began = self._clock.now()
        completion.cache = CacheOutcome.OFF
        path = "chat/completions" if job.prompts[0].messages else "completions"
        headers = {"authorization": f"Bearer {key}"} if (key := self._keys.get(model.name)) else {}
        try:
            with anyio.fail_after(max(0.001, job.deadline_at - began)):
                async with self._client.stream(
                    "POST", f"{model.url}/{path}", json=body, headers=headers, timeout=_timeout()
                ) as response:
                    await _check(response, model)
                    completion.start()
                    reason, usage = await _relay(response, completion)
        except TimeoutError as error:
            raise DeadlineExceeded("the request's time ran out") from error
        except httpx.HTTPError as error:
            raise Unavailable(f"the remote model {model.name!r} could not be reached", field="model") from error
        return Outcome(
            reason=reason,
            usage=usage,
            timings=Timings(decode_s=self._clock.now() - began),
            worker=WorkerId(model.name),
        )


async def _relay(response: httpx.Response, completion: Completion) -> tuple[FinishReason, Usage]:
    reasons: dict[int, FinishReason] = {}
    usage, deltas = Usage(), 0
    async for chunk in _chunks(response):
        for choice in chunk.get("choices") or ():
            index = int(choice.get("index", 0))
            delta = choice.get("delta") or {}
            text = choice.get("text") or delta.get("content") or ""
            calls = tuple(_call(call) for call in delta.get("tool_calls") or ())
            if text or calls:
                deltas += 1
                completion.pipe.put(Delta(index=index, text=text, calls=calls))
            if choice.get("finish_reason"):
                reasons[index] = _REASONS.get(choice["finish_reason"], FinishReason.STOP)
                completion.pipe.put(ChoiceDone(index=index, reason=reasons[index]))
        if chunk.get("usage"):
            usage = _usage(chunk["usage"])
    if len(reasons) < completion.job.params.n:
        raise Unavailable("the remote model's stream ended early")
    return reasons[0], usage if usage.completion_tokens else Usage(completion_tokens=deltas)


async def _chunks(response: httpx.Response) -> AsyncIterator[dict[str, Any]]:
    async for line in response.aiter_lines():
        if not line.startswith("data:"):
            continue
        data = line.removeprefix("data:").strip()
        if data == "[DONE]":
            return
        if len(data) > LINE_CHARS_MAX:
            raise Unavailable("the remote model sent an event beyond 1 MiB")
        try:
            chunk = json.loads(data)
        except ValueError as error:
            raise Unavailable("the remote model sent no JSON") from error
        if "error" in chunk:
            raise Unavailable("the remote model failed in the middle of its answer")
        yield chunk


def _body(job: Job, model: RemoteModel) -> dict[str, Any]:
    prompt, params = job.prompts[0], job.params
    if len(job.prompts) > 1 or prompt.ids is not None:
        raise InvalidArgument("a remote model takes one text prompt", field="prompt")
    if params.logprobs is not None:
        raise InvalidArgument("log-probabilities of remote models are not supported yet", field="logprobs")
    body: dict[str, Any] = {"model": model.remote_name, "stream": True, "stream_options": {"include_usage": True}}
    if prompt.messages:
        body["messages"] = [_message(m) for m in prompt.messages]
    else:
        body["prompt"] = prompt.text
    if job.tooling is not None:
        body |= _tools(job.tooling)
    if params.grammar:
        body["response_format"] = _response_format(params.grammar)
    return body | _params(params)


def _message(message: Message) -> dict[str, Any]:
    turn: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.tool_calls:
        turn["tool_calls"] = [
            {"id": c.id, "type": "function", "function": {"name": c.name, "arguments": c.arguments}}
            for c in message.tool_calls
        ]
    return turn | ({"tool_call_id": message.tool_call_id} if message.tool_call_id else {})


def _tools(tooling: Tooling) -> dict[str, Any]:
    choice: Any = tooling.choice.value.lower()
    if tooling.choice is ToolChoice.NAMED:
        choice = {"type": "function", "function": {"name": tooling.name}}
    return {
        "tools": [tool_json(tool) for tool in tooling.tools],
        "tool_choice": choice,
        "parallel_tool_calls": tooling.parallel,
    }


def _response_format(text: str) -> dict[str, Any]:
    grammar = read_grammar(text)
    if grammar.kind is GrammarKind.JSON_OBJECT:
        return {"type": "json_object"}
    if grammar.kind is GrammarKind.JSON_SCHEMA:
        return {"type": "json_schema", "json_schema": {"name": "answer", "schema": grammar.body, "strict": True}}
    raise InvalidArgument("a remote model takes JSON formats only", field="response_format")


def _call(raw: Mapping[str, Any]) -> CallDelta:
    function = raw.get("function") or {}
    return CallDelta(
        index=int(raw.get("index") or 0),
        id=str(raw.get("id") or ""),
        name=str(function.get("name") or ""),
        arguments=str(function.get("arguments") or ""),
    )


def _params(params: CallParams) -> dict[str, Any]:
    body = {name: value for name in _PARAMS if (value := getattr(params, name)) is not None}
    if params.max_tokens is not None:
        body["max_tokens"] = params.max_tokens
    if params.stop:
        body["stop"] = list(params.stop)
    if params.logit_bias:
        body["logit_bias"] = {str(token): bias for token, bias in params.logit_bias.items()}
    if params.ignore_eos:
        body["ignore_eos"] = True
    if params.n > 1:
        body["n"] = params.n
    return body


def _usage(raw: Mapping[str, Any]) -> Usage:
    details = raw.get("prompt_tokens_details") or {}
    return Usage(
        prompt_tokens=int(raw.get("prompt_tokens") or 0),
        completion_tokens=int(raw.get("completion_tokens") or 0),
        cached_tokens=int(details.get("cached_tokens") or 0),
    )


async def _check(response: httpx.Response, model: RemoteModel) -> None:
    """Raise what a status means to our client; the remote's own words may hold anything, so they stay there."""
    status = response.status_code
    if status < 400:
        return
    raise _error(status, model.name, _retry_after_ms(response))


def _error(status: int, name: str, retry_after_ms: int | None) -> CoveyError:
    if status == 404:
        return NotFound(f"the remote server of {name!r} does not know this model", field="model")
    if status in (400, 413, 422):
        return InvalidArgument(f"the remote server of {name!r} refused the request ({status})")
    if status == 429:
        return QuotaExceeded(f"the remote server of {name!r} limits its requests", retry_after_ms=retry_after_ms)
    if status == 503:
        return Overloaded(f"the remote server of {name!r} has no room", retry_after_ms=retry_after_ms)
    return Unavailable(f"the remote server of {name!r} answered {status}", field="model")


def _retry_after_ms(response: httpx.Response) -> int:
    text = response.headers.get("retry-after", "")
    return 1000 * int(text) if text.isdigit() and len(text) < 6 else 1000


def _timeout() -> httpx.Timeout:
    return httpx.Timeout(READ_GAP_S, connect=CONNECT_S)
