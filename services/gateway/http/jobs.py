"""From a checked body to a job."""

from __future__ import annotations

import secrets
from dataclasses import replace
from typing import Any

import msgspec

from covey.auth import Principal
from covey.errors import InvalidArgument
from covey.types.grammar import Grammar, GrammarKind, check_grammar
from covey.types.ids import RequestId
from covey.types.program import CallParams, FunctionCall, FunctionTool, Message, ToolChoice, Tooling
from services.gateway.job import Job, Prompt
from services.gateway.tools.forced import check_tooling

from .cache_controls import cache_controls
from .exchange import Exchange
from .schema import ChatBody, ChatMessage, ChosenTool, CompletionBody, ResponseFormat


def chat_job(body: ChatBody, x: Exchange, who: Principal, deadline_at: float) -> Job:
    """Raises InvalidArgument for fields that contradict each other, and for schemas that cannot be obeyed."""
    if body.top_logprobs is not None and not body.logprobs:
        raise InvalidArgument("`top_logprobs` needs `logprobs: true`", field="top_logprobs")
    limits = {limit for limit in (body.max_tokens, body.max_completion_tokens) if limit is not None}
    if len(limits) > 1:
        raise InvalidArgument("`max_tokens` and `max_completion_tokens` differ: send one", field="max_tokens")
    tooling = tooling_of(body)
    params = _params(body, max(limits, default=None), (body.top_logprobs or 0) if body.logprobs else None)
    if tooling is not None and params.grammar:
        raise InvalidArgument("`response_format` and `tools` exclude each other", field="response_format")
    prompt = Prompt(messages=messages(body.messages), tools=tooling.tools if tooling is not None else ())
    return replace(_job(body, x, who, (prompt,), params, deadline_at), tooling=tooling)


def completion_job(body: CompletionBody, x: Exchange, who: Principal, deadline_at: float) -> Job:
    """Raises InvalidArgument for a prompt of mixed kinds."""
    return _job(body, x, who, _prompts(body.prompt), _params(body, body.max_tokens, body.logprobs), deadline_at)


def messages(turns: list[ChatMessage]) -> tuple[Message, ...]:
    """Text parts are joined. Raises InvalidArgument for a turn without content."""
    return tuple(_message(i, turn) for i, turn in enumerate(turns))


def _message(i: int, turn: ChatMessage) -> Message:
    if turn.content is None and not turn.tool_calls:
        raise InvalidArgument(f"`messages[{i}].content` is required", field=f"messages[{i}].content")
    if turn.tool_calls is not None and turn.role != "assistant":
        raise InvalidArgument("only an assistant calls tools", field=f"messages[{i}].tool_calls")
    content = turn.content if isinstance(turn.content, str) else "".join(part.text for part in turn.content or ())
    calls = [
        FunctionCall(id=call.id, name=call.function.name, arguments=call.function.arguments)
        for call in turn.tool_calls or ()
    ]
    return Message(role=turn.role, content=content, tool_calls=tuple(calls), tool_call_id=turn.tool_call_id or "")


def tooling_of(body: ChatBody) -> Tooling | None:
    """The functions of a request, or None when none may be called. Raises InvalidArgument; see `check_tooling`."""
    choice = body.tool_choice
    if body.tools is None:
        for field in ("tool_choice", "parallel_tool_calls"):
            if getattr(body, field) not in (None, "none"):
                raise InvalidArgument(f"`{field}` needs `tools`", field=field)
        return None
    tools = tuple(
        FunctionTool(
            name=tool.function.name,
            description=tool.function.description,
            parameters=msgspec.json.encode(tool.function.parameters).decode() if tool.function.parameters else "",
        )
        for tool in body.tools
    )
    tooling = Tooling(
        tools=tools,
        choice=ToolChoice.NAMED if isinstance(choice, ChosenTool) else ToolChoice((choice or "auto").upper()),
        name=choice.function.name if isinstance(choice, ChosenTool) else "",
        parallel=body.parallel_tool_calls is not False,
    )
    check_tooling(tooling)
    return None if tooling.choice is ToolChoice.NONE else tooling


def _job(
    body: ChatBody | CompletionBody,
    x: Exchange,
    who: Principal,
    prompts: tuple[Prompt, ...],
    params: CallParams,
    deadline_at: float,
) -> Job:
    mode, max_age_s = cache_controls(body.cache, body.cache_max_age_s, x.headers.get("cache-control", ""))
    return Job(
        # A client may send the same request id twice; workers must not see it twice.
        request_id=RequestId(f"{x.request_id}-{secrets.token_hex(4)}"),
        tenant=who.tenant,
        model=body.model,
        prompts=prompts,
        params=params,
        cache=mode,
        max_age_s=max_age_s,
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
        grammar=_grammar(body.response_format),
    )


def _grammar(wanted: ResponseFormat | None) -> str:
    if wanted is None or wanted.type == "text":
        return ""
    kind: GrammarKind
    body: Any
    if wanted.type == "json_object":
        kind, body = GrammarKind.JSON_OBJECT, True
    elif wanted.type == "json_schema":
        kind, body = GrammarKind.JSON_SCHEMA, wanted.json_schema.schema if wanted.json_schema is not None else None
    elif wanted.type == "regex":
        kind, body = GrammarKind.REGEX, wanted.regex
    else:
        kind, body = GrammarKind.EBNF, wanted.grammar
    field = f"response_format.{wanted.type}"
    if body is None:
        raise InvalidArgument(f"`{field}` is required", field=field)
    grammar = Grammar(kind=kind, body=body)
    check_grammar(grammar, f"{field}.schema" if kind is GrammarKind.JSON_SCHEMA else field)
    return grammar.write("response_format")


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
