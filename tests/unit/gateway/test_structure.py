"""Formats and functions through the HTTP edge: what reaches a worker, and what the client is shown."""

from __future__ import annotations

import json
from typing import Any

from covey.codec.methods import Inference
from covey.types.generate import Failed, Role
from covey.types.program import CacheMode, CallParams, ChatRequest, ChoiceDone, Delta, FunctionTool, Message, Tooling
from tests.support.fake_mesh import MODEL, FakeWorker
from tests.support.grpc_edge import edge as grpc_edge
from tests.support.http_edge import Edge, http_edge

SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TOOL = {"type": "function", "function": {"name": "weather", "description": "Look outside", "parameters": SCHEMA}}
SCRIPT = 'Wait.<tool_call>\n{"name": "weather", "arguments": {"city": "Bern"}}\n</tool_call>'
BODY: dict[str, Any] = {"model": MODEL, "messages": [{"role": "user", "content": "Weather?"}], "temperature": 0}
CHAT = "/v1/chat/completions"


async def worker_of(edge: Edge, **options: Any) -> FakeWorker:
    return await edge.mesh.add(FakeWorker(name="d", role=Role.DECODE, **options))


def events_of(text: str) -> list[Any]:
    return [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")]


async def test_formats_reach_the_worker_as_a_grammar() -> None:
    formats: list[tuple[dict[str, Any], Any]] = [
        ({"type": "text"}, None),
        ({"type": "json_object"}, {"json_object": True}),
        (
            {"type": "json_schema", "json_schema": {"name": "c", "schema": SCHEMA, "strict": True}},
            {"json_schema": SCHEMA},
        ),
        ({"type": "regex", "regex": "a+"}, {"regex": "a+"}),
        ({"type": "grammar", "grammar": 'root ::= "a"'}, {"ebnf": 'root ::= "a"'}),
    ]
    async with http_edge() as edge:
        worker = await worker_of(edge)
        for format_, grammar in formats:
            reply = await edge.http.post(CHAT, json=BODY | {"response_format": format_})
            assert reply.status_code == 200, reply.text
            seen = worker.seen[-1].grammar
            assert (json.loads(seen) if seen else None) == grammar
        await edge.http.post("/v1/completions", json={"model": MODEL, "prompt": "a", "response_format": formats[1][0]})
        assert worker.seen[-1].grammar == '{"json_object":true}'


async def test_what_a_worker_finds_wrong_with_a_format_is_named_after_the_clients_field() -> None:
    async with http_edge() as edge:
        await worker_of(edge, fail=Failed(code="INVALID_ARGUMENT", message="no regex", field="grammar"))
        reply = await edge.http.post(CHAT, json=BODY | {"response_format": {"type": "regex", "regex": "(a"}})
    assert reply.status_code == 400
    assert reply.json()["error"]["param"] == "response_format"


async def test_calls_are_shown_whole_and_streamed() -> None:
    async with http_edge() as edge:
        worker = await worker_of(edge, script=SCRIPT)
        whole = (await edge.http.post(CHAT, json=BODY | {"tools": [TOOL], "cache": "bypass"})).json()["choices"][0]
        stream = await edge.http.post(CHAT, json=BODY | {"tools": [TOOL], "stream": True, "cache": "bypass"})
        plain = (await edge.http.post(CHAT, json=BODY | {"cache": "bypass"})).json()["choices"][0]
        none = await edge.http.post(CHAT, json=BODY | {"tools": [TOOL], "tool_choice": "none", "cache": "bypass"})
    assert whole["finish_reason"] == "tool_calls"
    assert whole["message"]["content"] == "Wait."
    (call,) = whole["message"]["tool_calls"]
    assert call["id"].startswith("call_")
    assert call["type"] == "function"
    assert call["function"] == {"name": "weather", "arguments": '{"city": "Bern"}'}
    choices = [event["choices"][0] for event in events_of(stream.text)]
    assert choices[-1]["finish_reason"] == "tool_calls"
    deltas = [d for choice in choices for d in choice["delta"].get("tool_calls", ())]
    assert deltas[0]["function"]["name"] == "weather"
    assert [d["id"] for d in deltas if "id" in d] == [deltas[0]["id"]]
    assert {d["index"] for d in deltas} == {0}
    assert "".join(d["function"]["arguments"] for d in deltas) == '{"city": "Bern"}'
    assert "".join(choice["delta"].get("content") or "" for choice in choices) == "Wait."
    for untouched in (plain, none.json()["choices"][0]):
        assert untouched["message"]["content"] == SCRIPT
        assert untouched["finish_reason"] == "stop"
    told, _, untold, not_told = (bytes(seen.token_ids).decode() for seen in worker.seen)
    assert '"name": "weather"' in told
    assert untold == not_told
    assert "weather" not in untold


async def test_a_forced_call_reaches_the_worker_as_a_grammar_and_a_cut_one_ends_by_length() -> None:
    named = {"type": "function", "function": {"name": "weather"}}
    async with http_edge() as edge:
        worker = await worker_of(edge, script=SCRIPT[5:])
        for choice in ("auto", "required", named):
            await edge.http.post(CHAT, json=BODY | {"tools": [TOOL], "tool_choice": choice, "cache": "bypass"})
        cut = await edge.http.post(
            CHAT, json=BODY | {"tools": [TOOL], "tool_choice": named, "max_tokens": 60, "cache": "bypass"}
        )
    auto, required, one = (seen.grammar for seen in worker.seen[:3])
    assert auto == ""
    assert not json.loads(required)["structural_tag"]["format"]["stop_after_first"]
    assert json.loads(one)["structural_tag"]["format"]["stop_after_first"]
    choice = cut.json()["choices"][0]
    assert choice["finish_reason"] == "length"
    arguments = choice["message"]["tool_calls"][0]["function"]["arguments"]
    assert '{"city": "Bern"}'.startswith(arguments)


async def test_history_with_calls_is_accepted() -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Bern"}'}}
    history = [
        *BODY["messages"],
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": "rain"},
    ]
    async with http_edge() as edge:
        worker = await worker_of(edge)
        reply = await edge.http.post(CHAT, json=BODY | {"messages": history, "tools": [TOOL]})
        empty = await edge.http.post(CHAT, json=BODY | {"messages": [{"role": "user", "content": None}]})
    assert reply.status_code == 200
    prompt = bytes(worker.seen[0].token_ids).decode()
    assert '{"name": "weather", "arguments": {"city": "Bern"}}' in prompt
    assert "rain" in prompt
    assert (empty.status_code, empty.json()["error"]["param"]) == (400, "messages[0].content")


async def test_n_choices_share_the_prompt_and_have_seeds_of_their_own() -> None:
    async with http_edge() as edge:
        worker = await worker_of(edge)
        body = BODY | {"n": 3, "seed": 7, "temperature": 1, "cache": "bypass"}
        whole = (await edge.http.post(CHAT, json=body)).json()
        stream = await edge.http.post(CHAT, json=body | {"stream": True})
    assert [choice["index"] for choice in whole["choices"]] == [0, 1, 2]
    texts = [choice["message"]["content"] for choice in whole["choices"]]
    assert len(set(texts)) == 3
    assert sorted(seen.sampling.seed for seen in worker.seen[:3]) == [7, 8, 9]
    assert len({seen.token_ids for seen in worker.seen}) == 1
    streamed = ["", "", ""]
    for event in events_of(stream.text):
        for choice in event["choices"]:
            streamed[choice["index"]] += choice["delta"].get("content") or ""
    assert streamed == texts


async def test_functions_over_grpc() -> None:
    async with grpc_edge() as (mesh, channel):
        await mesh.add(FakeWorker(name="d", role=Role.DECODE, script=SCRIPT))
        request = ChatRequest(
            model=MODEL,
            messages=(Message(role="user", content="hi"),),
            params=CallParams(temperature=0.0),
            cache=CacheMode.BYPASS,
            tooling=Tooling(tools=(FunctionTool(name="weather", parameters=json.dumps(SCHEMA)),)),
        )
        async with channel.stream(Inference.CHAT, request, timeout_s=5) as stream:
            events = [event async for event in stream]
    calls = [call for event in events if isinstance(event, Delta) for call in event.calls]
    assert calls[0].name == "weather"
    assert "".join(call.arguments for call in calls) == '{"city": "Bern"}'
    assert [event.reason for event in events if isinstance(event, ChoiceDone)] == ["TOOL_CALLS"]
