"""The JSON that clients read: chunks, choices, usage, log-probabilities, and Covey's own account of a request."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Protocol

from covey.types.generate import FinishReason, TokenLogprob, TopLogprob, Usage
from covey.types.program import CallDelta, Completed, Delta

Json = dict[str, Any]

_REASONS = {
    FinishReason.STOP: "stop",
    FinishReason.LENGTH: "length",
    FinishReason.TOOL_CALLS: "tool_calls",
    FinishReason.CANCELLED: "stop",
}


class Shape(Protocol):
    """How one endpoint presents choices."""

    prefix: str
    kind: str
    chunk_kind: str

    def opening(self, index: int) -> Json | None:
        """The first choice of a stream, before any text."""
        ...

    def delta(self, delta: Delta, chars_before: int) -> Json: ...
    def finish(self, index: int, reason: FinishReason) -> Json: ...
    def whole(self, whole: Delta, reason: FinishReason) -> Json:
        """A choice that is complete: `whole` has all of its text, calls and log-probabilities."""
        ...


class ChatShape:
    """`chat.completion`."""

    prefix = "chatcmpl"
    kind = "chat.completion"
    chunk_kind = "chat.completion.chunk"

    def __init__(self, top_logprobs: int | None) -> None:
        """`top_logprobs` is None when no log-probabilities were asked for."""
        self._top = top_logprobs

    def opening(self, index: int) -> Json | None:
        return self._choice(index, {"role": "assistant", "content": ""}, None, None)

    def delta(self, delta: Delta, chars_before: int) -> Json:
        message: Json = {"content": delta.text} if delta.text or not delta.calls else {}
        if delta.calls:
            message["tool_calls"] = [_call_delta(call) for call in delta.calls]
        return self._choice(delta.index, message, self._logprobs(delta.logprobs), None)

    def finish(self, index: int, reason: FinishReason) -> Json:
        return self._choice(index, {}, None, _REASONS[reason])

    def whole(self, whole: Delta, reason: FinishReason) -> Json:
        message: Json = {"role": "assistant", "content": whole.text, "refusal": None}
        if whole.calls:
            message |= {"content": whole.text or None, "tool_calls": [_call(call) for call in whole.calls]}
        return {
            "index": whole.index,
            "message": message,
            "logprobs": self._logprobs(whole.logprobs),
            "finish_reason": _REASONS[reason],
        }

    def _choice(self, index: int, delta: Json, logprobs: Json | None, reason: str | None) -> Json:
        return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}

    def _logprobs(self, tokens: tuple[TokenLogprob, ...]) -> Json | None:
        if self._top is None:
            return None
        top = self._top
        content = [_token(t) | {"top_logprobs": [_token(o) for o in t.top[:top]]} for t in tokens]
        return {"content": content, "refusal": None}


class TextShape:
    """`text_completion`, with the legacy form of log-probabilities."""

    prefix = "cmpl"
    kind = "text_completion"
    chunk_kind = "text_completion"

    def __init__(self, logprobs: int | None) -> None:
        self._top = logprobs

    def opening(self, index: int) -> Json | None:
        return None

    def delta(self, delta: Delta, chars_before: int) -> Json:
        return self._choice(delta.index, delta.text, self._logprobs(delta.logprobs, chars_before), None)

    def finish(self, index: int, reason: FinishReason) -> Json:
        return self._choice(index, "", None, _REASONS[reason])

    def whole(self, whole: Delta, reason: FinishReason) -> Json:
        return self._choice(whole.index, whole.text, self._logprobs(whole.logprobs, 0), _REASONS[reason])

    def _choice(self, index: int, text: str, logprobs: Json | None, reason: str | None) -> Json:
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}

    def _logprobs(self, tokens: tuple[TokenLogprob, ...], chars_before: int) -> Json | None:
        if self._top is None:
            return None
        texts = [_text(t.token) for t in tokens]
        offsets, at = [], chars_before
        for text in texts:
            offsets.append(at)
            at += len(text)
        top = [{_text(t.token): t.logprob} | {_text(o.token): o.logprob for o in t.top[: self._top]} for t in tokens]
        return {
            "tokens": texts,
            "token_logprobs": [t.logprob for t in tokens],
            "top_logprobs": top,
            "text_offset": offsets,
        }


def usage_json(usage: Usage) -> Json:
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens + usage.loaded_tokens},
    }


def covey_json(end: Completed, request_id: str) -> Json:
    """Where the time of a request went and what the caches did."""
    times, usage = end.timings, end.usage
    stages = {
        "queue": times.queue_s,
        "lookup": times.lookup_s,
        "prefill": times.prefill_s,
        "transfer": times.transfer_s,
        "kv_wait": times.kv_wait_s,
        "decode": times.decode_s,
    }
    return {
        "timings_ms": {stage: round(1000 * seconds, 3) for stage, seconds in stages.items()},
        "cache": end.cache.value.lower(),
        "split": end.split,
        "cached_tokens": usage.cached_tokens,
        "loaded_tokens": usage.loaded_tokens,
        "blocks_moved": usage.blocks_moved,
        "migrations": end.migrations,
        "request_id": request_id,
    }


def joined(deltas: Sequence[Delta], index: int) -> Delta:
    """All deltas of one choice as one; each call is whole in it."""
    calls: dict[int, CallDelta] = {}
    for more in (call for delta in deltas for call in delta.calls):
        known = calls.get(more.index)
        calls[more.index] = more if known is None else replace(known, arguments=known.arguments + more.arguments)
    return Delta(
        index=index,
        text="".join(delta.text for delta in deltas),
        ids=tuple(token for delta in deltas for token in delta.ids),
        logprobs=tuple(logprob for delta in deltas for logprob in delta.logprobs),
        calls=tuple(calls[i] for i in sorted(calls)),
    )


def _call(call: CallDelta) -> Json:
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}


def _call_delta(call: CallDelta) -> Json:
    """The first delta of a call says what it is; later ones have arguments only."""
    head: Json = {"id": call.id, "type": "function"} if call.id else {}
    name: Json = {"name": call.name} if call.name else {}
    return {"index": call.index} | head | {"function": name | {"arguments": call.arguments}}


def _token(t: TokenLogprob | TopLogprob) -> Json:
    return {"token": _text(t.token), "logprob": t.logprob, "bytes": list(t.token)}


def _text(token: bytes) -> str:
    return token.decode("utf-8", "replace")
