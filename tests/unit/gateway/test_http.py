"""The HTTP edge over a real socket: bytes of streams, bodies, errors, disconnects, and what needs no key."""

from __future__ import annotations

import base64
import json
import struct
from typing import Any

import anyio
import httpx
import pytest

from covey.config import TenantConfig
from covey.testing import assert_eventually
from covey.types.generate import Role
from services.gateway.config import DispatchSettings
from tests.support.fake_mesh import CONTEXT, MODEL, OTHER_KEY, FakeSemCache, FakeWorker, fast
from tests.support.http_edge import Edge, http_edge

CHAT: dict[str, Any] = {"model": MODEL, "messages": [{"role": "user", "content": "hello"}], "temperature": 0}


def events(text: str) -> list[Any]:
    blocks = [b for b in text.split("\n\n") if b and not b.startswith(":")]
    assert all(b.startswith("data: ") for b in blocks)
    return [b.removeprefix("data: ") for b in blocks]


async def decode(edge: Edge, **faults: Any) -> FakeWorker:
    return await edge.mesh.add(FakeWorker(name="d", role=Role.DECODE, **faults))


async def test_a_chat_answer_has_openais_shape_and_coveys_account() -> None:
    async with http_edge(fast(split="always")) as edge:
        await edge.mesh.add(FakeWorker(name="p", role=Role.PREFILL))
        await decode(edge)
        reply = await edge.http.post("/v1/chat/completions", json=CHAT, headers={"x-request-id": "mine"})
    body = reply.json()
    assert reply.status_code == 200
    assert reply.headers["x-request-id"] == "mine"
    assert reply.headers["x-covey-cache"] == "off"
    assert body["object"] == "chat.completion"
    (choice,) = body["choices"]
    assert choice["message"]["role"] == "assistant"
    assert len(choice["message"]["content"]) == 12
    assert (choice["finish_reason"], choice["logprobs"]) == ("stop", None)
    assert body["usage"]["total_tokens"] == body["usage"]["prompt_tokens"] + 12
    assert body["usage"]["prompt_tokens_details"] == {"cached_tokens": 3}
    account = body["covey"]
    assert set(account["timings_ms"]) == {"queue", "lookup", "prefill", "transfer", "kv_wait", "decode"}
    assert account["timings_ms"]["prefill"] == 250
    assert {k: account[k] for k in ("cache", "split", "blocks_moved", "migrations", "request_id")} == {
        "cache": "off",
        "split": True,
        "blocks_moved": 2,
        "migrations": 0,
        "request_id": "mine",
    }


async def test_a_stream_is_role_text_finish_done() -> None:
    async with http_edge() as edge:
        await decode(edge, answer_tokens=3)
        reply = await edge.http.post("/v1/chat/completions", json=CHAT | {"stream": True})
    assert reply.headers["content-type"].startswith("text/event-stream")
    *chunks, done = events(reply.text)
    assert done == "[DONE]"
    parsed = [json.loads(c) for c in chunks]
    assert len({(c["id"], c["created"], c["model"], c["object"]) for c in parsed}) == 1
    assert parsed[0]["object"] == "chat.completion.chunk"
    assert parsed[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert all(set(c["choices"][0]["delta"]) == {"content"} for c in parsed[1:-1])
    assert parsed[-1]["choices"][0] == {"index": 0, "delta": {}, "logprobs": None, "finish_reason": "stop"}
    assert "covey" in parsed[-1]
    assert not any("usage" in c for c in parsed)


async def test_include_usage_ends_with_a_chunk_without_choices() -> None:
    async with http_edge() as edge:
        await decode(edge, answer_tokens=3)
        body = CHAT | {"stream": True, "stream_options": {"include_usage": True}}
        reply = await edge.http.post("/v1/chat/completions", json=body)
    *chunks, done = events(reply.text)
    assert done == "[DONE]"
    parsed = [json.loads(c) for c in chunks]
    assert parsed[-1]["choices"] == []
    assert parsed[-1]["usage"]["completion_tokens"] == 3
    assert parsed[-1]["covey"]["split"] is False
    assert all(c["usage"] is None for c in parsed[:-1])


async def test_a_stream_with_several_choices_finishes_each() -> None:
    async with http_edge() as edge:
        await decode(edge, answer_tokens=3)
        reply = await edge.http.post(
            "/v1/chat/completions", json=CHAT | {"stream": True, "n": 2, "temperature": 1, "seed": 3}
        )
    choices = [json.loads(c)["choices"][0] for c in events(reply.text)[:-1]]
    assert [c["index"] for c in choices if c["delta"].get("role")] == [0, 1]
    assert sorted(c["index"] for c in choices if c["finish_reason"]) == [0, 1]


async def test_an_error_inside_a_stream_is_an_event() -> None:
    async with http_edge() as edge:
        await decode(edge, die_after=2)
        config_wait = CHAT | {"stream": True}
        reply = await edge.http.post("/v1/chat/completions", json=config_wait)
    assert reply.status_code == 200
    *_, last = events(reply.text)
    error = json.loads(last)["error"]
    assert error["type"] == "overloaded_error"
    assert error["code"] == "unavailable"
    assert "[DONE]" not in reply.text


async def test_heartbeats_while_nothing_comes() -> None:
    dispatch = DispatchSettings(heartbeat_s=0.05, event_gap_s=5.0)
    async with http_edge(fast(dispatch=dispatch)) as edge:
        gate = anyio.Event()
        await decode(edge, gate=gate)
        async with edge.http.stream("POST", "/v1/chat/completions", json=CHAT | {"stream": True}) as reply:
            text = ""
            async for piece in reply.aiter_text():
                text += piece
                if text.count(": heartbeat\n\n") == 2:
                    gate.set()
    assert text.endswith("data: [DONE]\n\n")
    assert len(events(text)) > 12


async def test_legacy_completions_and_their_log_probabilities() -> None:
    async with http_edge() as edge:
        await decode(edge, answer_tokens=4)
        body = {"model": MODEL, "prompt": ["ab", "cd"], "temperature": 0, "logprobs": 1}
        reply = (await edge.http.post("/v1/completions", json=body)).json()
        tokens = (await edge.http.post("/v1/completions", json=body | {"prompt": [97, 98], "logprobs": None})).json()
    assert reply["object"] == "text_completion"
    assert [c["index"] for c in reply["choices"]] == [0, 1]
    first = reply["choices"][0]
    assert first["logprobs"]["tokens"] == list(first["text"])
    assert first["logprobs"]["text_offset"] == [0, 1, 2, 3]
    assert first["logprobs"]["token_logprobs"] == [-0.5] * 4
    assert first["logprobs"]["top_logprobs"][0] == {first["text"][0]: -0.5, "?": -2.0}
    assert tokens["choices"][0]["text"] == first["text"]
    assert reply["usage"]["prompt_tokens"] == 4


async def test_chat_log_probabilities() -> None:
    async with http_edge() as edge:
        await decode(edge, answer_tokens=2)
        body = CHAT | {"logprobs": True, "top_logprobs": 1}
        reply = (await edge.http.post("/v1/chat/completions", json=body)).json()
    content = reply["choices"][0]["logprobs"]["content"]
    assert [c["token"] for c in content] == list(reply["choices"][0]["message"]["content"])
    assert content[0]["top_logprobs"] == [{"token": "?", "logprob": -2.0, "bytes": [63]}]


async def test_extras_reach_the_worker() -> None:
    async with http_edge() as edge:
        worker = await decode(edge)
        extras = {
            "top_k": 5, "min_p": 0.1, "repetition_penalty": 1.2, "min_tokens": 2, "ignore_eos": True, "priority": 3,
            "temperature": 0.5, "top_p": 0.9, "seed": -1, "logit_bias": {"97": -100}, "stop": ["x", "y"],
            "max_completion_tokens": 7, "presence_penalty": 1, "frequency_penalty": -1, "user": "u", "cache": "bypass",
        }  # fmt: skip
        reply = await edge.http.post("/v1/chat/completions", json=CHAT | extras)
    assert reply.headers["x-covey-cache"] == "bypass"
    (seen,) = worker.seen
    assert (seen.priority, seen.stop, dict(seen.hints)) == (3, ("x", "y"), {"user": "u"})
    sampling = seen.sampling
    assert (sampling.max_tokens, sampling.seed, sampling.min_tokens) == (7, 2**63 - 1, 2)
    assert (sampling.top_k, sampling.ignore_eos, dict(sampling.logit_bias)) == (5, True, {97: -100.0})


TOOL = {"type": "function", "function": {"name": "f"}}
BAD: list[tuple[Any, int, str | None, str]] = [
    (b"{", 400, None, "invalid_argument"),
    (b"[]", 400, None, "invalid_argument"),
    (b"\xff", 400, None, "invalid_argument"),
    (b"[" * 5000, 400, None, "invalid_argument"),
    ({}, 400, "messages", "invalid_argument"),
    ({"max_tokens": -1}, 400, "max_tokens", "invalid_argument"),
    ({"max_tokens": "5"}, 400, "max_tokens", "invalid_argument"),
    ({"max_tokens": 5, "user": None, "top_p": "1"}, 400, "top_p", "invalid_argument"),
    ({"max_tokens": 5, "max_completion_tokens": 6}, 400, "max_tokens", "invalid_argument"),
    ({"temperature": 3}, 400, "temperature", "invalid_argument"),
    ({"n": 0}, 400, "n", "invalid_argument"),
    ({"messages": []}, 400, "messages", "invalid_argument"),
    ({"messages": [{"role": "wizard", "content": ""}]}, 400, "messages[0].role", "invalid_argument"),
    (
        {"messages": [{"role": "user", "content": "a", "tool_calls": []}]},
        400,
        "messages[0].tool_calls",
        "invalid_argument",
    ),
    ({"tools": []}, 400, "tools", "invalid_argument"),
    ({"tools": [TOOL, TOOL]}, 400, "tools", "invalid_argument"),
    ({"tools": [TOOL | {"type": "retrieval"}]}, 400, "tools[0].type", "invalid_argument"),
    ({"tool_choice": "auto"}, 400, "tool_choice", "invalid_argument"),
    ({"tools": [TOOL], "tool_choice": "maybe"}, 400, "tool_choice", "invalid_argument"),
    (
        {"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "g"}}},
        400,
        "tool_choice",
        "invalid_argument",
    ),
    ({"tools": [TOOL], "response_format": {"type": "json_object"}}, 400, "response_format", "invalid_argument"),
    ({"audio": {}}, 400, "audio", "unsupported_parameter"),
    ({"response_format": {"type": "yaml"}}, 400, "response_format.type", "invalid_argument"),
    ({"response_format": {"type": "regex"}}, 400, "response_format.regex", "invalid_argument"),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"not": {}}}}},
        400,
        "response_format.json_schema.schema.not",
        "invalid_argument",
    ),
    ({"max_token": 5}, 400, "max_token", "unknown_parameter"),
    ({"stream_options": {"x": 1}}, 400, "stream_options.x", "unknown_parameter"),
    ({"top_logprobs": 3}, 400, "top_logprobs", "invalid_argument"),
    ({"logit_bias": {"300": 1}}, 400, "logit_bias", "invalid_argument"),
    ({"model": "gpt-9"}, 404, "model", "model_not_found"),
    ({"max_tokens": CONTEXT}, 400, "messages", "context_length_exceeded"),
    ({"messages": [{"role": "user", "content": "x" * CONTEXT}]}, 400, "messages", "context_length_exceeded"),
    ({"cache": "maybe"}, 400, "cache", "invalid_argument"),
]


@pytest.mark.parametrize("stream", [False, True])
async def test_bad_input_is_named_and_reaches_no_worker(stream: bool) -> None:
    async with http_edge() as edge:
        worker = await decode(edge)
        for change, status, param, code in BAD:
            body = {"model": MODEL} if change == {} else change
            if isinstance(body, dict) and change:
                body = CHAT | {"stream": stream} | body
            content = body if isinstance(body, bytes) else json.dumps(body).encode()
            reply = await edge.http.post("/v1/chat/completions", content=content)
            error = reply.json()["error"]
            assert (reply.status_code, error["param"], error["code"]) == (status, param, code), (change, error)
            assert error["type"] in ("invalid_request_error", "not_found_error")
            assert error["message"]
            assert reply.headers["x-request-id"]
    assert not worker.seen


async def test_nulls_count_as_not_sent() -> None:
    async with http_edge() as edge:
        await decode(edge)
        reply = await edge.http.post("/v1/chat/completions", json=CHAT | {"tools": None, "stop": None, "store": None})
    assert reply.status_code == 200


async def test_a_body_over_the_limit_is_refused_before_it_is_read() -> None:
    async with http_edge(fast(body_bytes_max=1000)) as edge:
        announced = await edge.http.post("/v1/chat/completions", content=b"x" * 100_000_000)
        client = await anyio.connect_tcp("127.0.0.1", int(edge.address.rpartition(":")[2]))
        head = (
            f"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nauthorization: {edge.http.headers['authorization']}\r\n"
        )
        await client.send(head.encode() + b"transfer-encoding: chunked\r\n\r\n7d0\r\n" + b"x" * 2000 + b"\r\n")
        with anyio.fail_after(1):
            streamed = await client.receive()  # although the body has not ended
        await client.aclose()
    assert announced.status_code == 413
    assert announced.json()["error"]["code"] == "payload_too_large"
    assert streamed.startswith(b"HTTP/1.1 413 ")


async def test_keys_are_asked_for_where_they_matter() -> None:
    async with http_edge() as edge:
        await decode(edge)
        async with httpx.AsyncClient(base_url=edge.url) as nobody:
            for path in ("/health", "/livez", "/readyz", "/version", "/metrics", "/openapi.json"):
                assert (await nobody.get(path)).status_code == 200, path
            refused = await nobody.get("/v1/models")
            wrong = await nobody.post("/v1/chat/completions", json=CHAT, headers={"authorization": "Bearer wrong"})
        other = await edge.http.get("/v1/models", headers={"authorization": f"Bearer {OTHER_KEY}"})
    for reply in (refused, wrong):
        assert reply.status_code == 401
        assert reply.json()["error"]["code"] == "invalid_api_key"
    assert other.status_code == 200


async def test_unready_without_workers_and_503_with_a_hint() -> None:
    async with http_edge() as edge:
        assert (await edge.http.get("/readyz")).status_code == 503
        reply = await edge.http.post("/v1/chat/completions", json=CHAT)
    assert reply.status_code == 503
    assert int(reply.headers["retry-after"]) >= 1
    assert reply.headers["x-should-retry"] == "true"


async def test_models_tokenize_and_unknown_paths() -> None:
    async with http_edge() as edge:
        await edge.mesh.add_semcache(FakeSemCache())
        await decode(edge)
        models = (await edge.http.get("/v1/models")).json()
        one = (await edge.http.get(f"/v1/models/{MODEL}")).json()
        missing = await edge.http.get("/v1/models/none")
        tokens = (await edge.http.post("/tokenize", json={"model": MODEL, "prompt": "ab"})).json()
        nowhere = await edge.http.get("/v1/responses")
        method = await edge.http.get("/v1/chat/completions")
        document = (await edge.http.get("/openapi.json")).json()
    assert [m["id"] for m in models["data"]] == [MODEL, "tiny-embedder"]
    assert one["max_model_len"] == CONTEXT
    assert (missing.status_code, missing.json()["error"]["code"]) == (404, "model_not_found")
    assert tokens == {"tokens": [97, 98], "count": 2, "max_model_len": CONTEXT}
    assert (nowhere.status_code, method.status_code) == (404, 405)
    assert "/v1/chat/completions" in document["paths"]
    assert "ChatBody" in document["components"]["schemas"]


async def test_embeddings_as_floats_and_base64() -> None:
    async with http_edge() as edge:
        await edge.mesh.add_semcache(FakeSemCache())
        body = {"model": "tiny-embedder", "input": ["abc", "d"]}
        floats = (await edge.http.post("/v1/embeddings", json=body)).json()
        packed = (await edge.http.post("/v1/embeddings", json=body | {"encoding_format": "base64"})).json()
        wrong = await edge.http.post("/v1/embeddings", json=body | {"model": "x"})
    assert [d["embedding"] for d in floats["data"]] == [[3.0, 0.5], [1.0, 0.5]]
    assert struct.unpack("<2f", base64.b64decode(packed["data"][1]["embedding"])) == (1.0, 0.5)
    assert floats["usage"] == {"prompt_tokens": 4, "total_tokens": 4}
    assert wrong.status_code == 404


@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_leaves_frees_the_worker(stream: bool) -> None:
    async with http_edge() as edge:
        worker = await decode(edge, pace_s=0.02, answer_tokens=400)
        payload = json.dumps(CHAT | {"stream": stream, "max_tokens": 400}).encode()
        client = await anyio.connect_tcp("127.0.0.1", int(edge.address.rpartition(":")[2]))
        head = (
            f"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nauthorization: {edge.http.headers['authorization']}\r\n"
            f"content-length: {len(payload)}\r\n\r\n"
        )
        await client.send(head.encode() + payload)
        await assert_eventually(lambda: worker.running == 1)
        await client.aclose()
        await assert_eventually(lambda: worker.running == 0, timeout_s=0.25)
        await assert_eventually(lambda: edge.mesh.metric("covey_num_requests_running") == 0)
    assert worker.cancelled == 1


async def test_metrics_have_vllms_meanings() -> None:
    async with http_edge() as edge:
        await decode(edge)
        await edge.http.post("/v1/chat/completions", json=CHAT)
        text = (await edge.http.get("/metrics")).text
    for line in (
        f'covey_time_to_first_token_seconds_count{{model="{MODEL}"}} 1.0',
        f'covey_inter_token_latency_seconds_count{{model="{MODEL}"}} 11.0',
        f'covey_e2e_request_latency_seconds_count{{model="{MODEL}"}} 1.0',
        f'covey_generation_tokens_total{{model="{MODEL}"}} 12.0',
        f'covey_requests_total{{code="OK",model="{MODEL}"}} 1.0',
        "covey_num_requests_running 0.0",
    ):
        assert line in text


async def test_the_trace_goes_on_at_the_worker() -> None:
    trace = "0af7651916cd43dd8448eb211c80319c"
    async with http_edge() as edge:
        worker = await decode(edge)
        parent = {"traceparent": f"00-{trace}-b7ad6b7169203331-01"}
        await edge.http.post("/v1/chat/completions", json=CHAT, headers=parent)
    assert worker.headers[0]["traceparent"].split("-")[1] == trace


async def test_logs_name_the_request_and_never_the_prompt() -> None:
    async with http_edge() as edge:
        await decode(edge)
        reply = await edge.http.post("/v1/chat/completions", json=CHAT, headers={"x-request-id": "mine"})
        answer = reply.json()["choices"][0]["message"]["content"]
        (line,) = [json.loads(text) for text in edge.mesh.logged.getvalue().splitlines()]
    assert line["request_id"].startswith("mine-")
    assert (line["event"], line["code"], line["tenant"]) == ("request ended", "OK", "acme")
    assert "hello" not in json.dumps(line)
    assert answer not in json.dumps(line)


async def test_a_tenants_limit_per_minute_is_429_with_a_hint() -> None:
    tenants = {"acme": TenantConfig(key_file="", requests_per_minute=2)}
    async with http_edge(fast(tenants=tenants)) as edge:
        await decode(edge)
        statuses = [(await edge.http.post("/v1/chat/completions", json=CHAT)).status_code for _ in range(2)]
        refused = await edge.http.post("/v1/chat/completions", json=CHAT)
        other = await edge.http.post(
            "/v1/chat/completions", json=CHAT, headers={"authorization": f"Bearer {OTHER_KEY}"}
        )
    assert statuses == [200, 200]
    assert refused.status_code == 429
    assert 1 <= int(refused.headers["retry-after"]) <= 31
    assert refused.json()["error"]["code"] == "rate_limit_exceeded"
    assert other.status_code == 200
