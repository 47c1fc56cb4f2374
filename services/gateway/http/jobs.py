"""From a checked body to a job."""

from __future__ import annotations

import secrets

from covey.auth import Principal
from covey.errors import InvalidArgument
from covey.types.ids import RequestId
from covey.types.program import CacheMode, CallParams, Message
from services.gateway.job import Job, Prompt

from .body import NotSupportedYet
from .exchange import Exchange
from .schema import ChatBody, ChatMessage, CompletionBody

_CACHE = {
    "use": CacheMode.USE,
    "bypass": CacheMode.BYPASS,
    "no-store": CacheMode.NO_STORE,
    "refresh": CacheMode.REFRESH,
}


def chat_job(body: ChatBody, x: Exchange, who: Principal, deadline_at: float) -> Job:
    """Raises InvalidArgument for fields that contradict each other, NotSupportedYet for formats."""
    if body.response_format is not None and body.response_format.type != "text":
        raise NotSupportedYet("only `response_format` of type text is supported yet", field="response_format")
    if body.top_logprobs is not None and not body.logprobs:
        raise InvalidArgument("`top_logprobs` needs `logprobs: true`", field="top_logprobs")
    limits = {limit for limit in (body.max_tokens, body.max_completion_tokens) if limit is not None}
    if len(limits) > 1:
        raise InvalidArgument("`max_tokens` and `max_completion_tokens` differ: send one", field="max_tokens")
    prompt = Prompt(messages=messages(body.messages))
    params = _params(body, max(limits, default=None), (body.top_logprobs or 0) if body.logprobs else None)
    return _job(body, x, who, (prompt,), params, deadline_at)


def completion_job(body: CompletionBody, x: Exchange, who: Principal, deadline_at: float) -> Job:
    """Raises InvalidArgument for a prompt of mixed kinds."""
    return _job(body, x, who, _prompts(body.prompt), _params(body, body.max_tokens, body.logprobs), deadline_at)


def messages(turns: list[ChatMessage]) -> tuple[Message, ...]:
    """Text parts are joined."""
    return tuple(
        Message(
            role=turn.role,
            content=turn.content if isinstance(turn.content, str) else "".join(part.text for part in turn.content),
        )
        for turn in turns
    )


def _job(
    body: ChatBody | CompletionBody,
    x: Exchange,
    who: Principal,
    prompts: tuple[Prompt, ...],
    params: CallParams,
    deadline_at: float,
) -> Job:
    return Job(
        # A client may send the same request id twice; workers must not see it twice.
        request_id=RequestId(f"{x.request_id}-{secrets.token_hex(4)}"),
        tenant=who.tenant,
        model=body.model,
        prompts=prompts,
        params=params,
        cache=_CACHE[body.cache],
        deadline_at=deadline_at,
        priority=body.priority,
        hints={"user": body.user} if body.user else {},
    )


def _params(body: ChatBody | CompletionBody, max_tokens: int | None, logprobs: int | None) -> CallParams:
    stop = (body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ())
    return CallParams(
        max_tokens=max_tokens,
        temperature=body.temperature,
        top_p=body.top_p,
        top_k=body.top_k,
        min_p=body.min_p,
        seed=None if body.seed is None else body.seed % 2**63,
        presence_penalty=body.presence_penalty,
        frequency_penalty=body.frequency_penalty,
        repetition_penalty=body.repetition_penalty,
        logit_bias=body.logit_bias or {},
        logprobs=logprobs,
        min_tokens=body.min_tokens,
        ignore_eos=body.ignore_eos,
        stop=stop,
        n=body.n or 1,
    )


def _prompts(prompt: str | list[str | int | list[int]]) -> tuple[Prompt, ...]:
    if isinstance(prompt, str):
        return (Prompt(text=prompt),)
    if not prompt:
        raise InvalidArgument("the prompt is empty", field="prompt")
    if all(isinstance(p, int) for p in prompt):
        return (Prompt(ids=tuple(p for p in prompt if isinstance(p, int))),)
    if any(isinstance(p, int) for p in prompt):
        raise InvalidArgument("a prompt is a text, texts, tokens, or lists of tokens: not a mixture", field="prompt")
    return tuple(Prompt(text=p) if isinstance(p, str) else Prompt(ids=_ids(p)) for p in prompt)


def _ids(value: int | list[int]) -> tuple[int, ...]:
    assert not isinstance(value, int), "mixtures were refused"
    return tuple(value)
