"""A model at another OpenAI-compatible server: here a second gateway's real HTTP edge."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest

from covey.clock import MonotonicClock
from covey.testing import assert_eventually, free_port
from covey.types.generate import Role
from services.gateway import assembly
from services.gateway.http.server import serve_http
from services.gateway.models import RemoteModel
from services.gateway.remote import RemoteModels
from tests.support.fake_mesh import API_KEY, MODEL, FakeWorker, fake_mesh
from tests.support.http_edge import Edge, http_edge

BODY: dict[str, Any] = {"model": "far", "messages": [{"role": "user", "content": "hello"}], "temperature": 0}


@asynccontextmanager
async def front(url: str, monkeypatch: pytest.MonkeyPatch, key: str = API_KEY) -> AsyncIterator[httpx.AsyncClient]:
    """A gateway whose only model is remote."""

    def with_key(client: httpx.AsyncClient, _keys: object, clock: MonotonicClock) -> RemoteModels:
        return RemoteModels(client, {"far": key}, clock)

    monkeypatch.setattr(assembly, "RemoteModels", with_key)
    model = RemoteModel(name="far", url=url, remote_name=MODEL, context_limit=4096)
    async with fake_mesh() as mesh:
        gateway = await mesh.gateway(models=(model,))
        async with (
            serve_http(gateway.app, "127.0.0.1:0", drain_s=1.0) as address,
            httpx.AsyncClient(
                base_url=f"http://{address}", headers={"authorization": f"Bearer {API_KEY}"}, timeout=20.0
            ) as client,
        ):
            yield client


async def worker_of(edge: Edge, **faults: Any) -> FakeWorker:
    return await edge.mesh.add(FakeWorker(name="d", role=Role.DECODE, **faults))


async def test_answers_and_streams_are_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    async with http_edge() as far, front(f"{far.url}/v1", monkeypatch) as client:
        worker = await worker_of(far)
        direct = (await far.http.post("/v1/chat/completions", json=BODY | {"model": MODEL})).json()
        whole = (await client.post("/v1/chat/completions", json=BODY | {"top_k": 4, "stop": "zz"})).json()
        stream = await client.post("/v1/chat/completions", json=BODY | {"stream": True})
        text = (await client.post("/v1/completions", json={"model": "far", "prompt": "ab", "max_tokens": 3})).json()
        models = (await client.get("/v1/models")).json()["data"]
        ready = await client.get("/readyz")
    assert whole["model"] == "far"
    assert whole["choices"][0]["message"] == direct["choices"][0]["message"]
    assert whole["usage"] == direct["usage"]
    assert stream.text.endswith("data: [DONE]\n\n")
    assert (worker.seen[1].sampling.top_k, worker.seen[1].stop) == (4, ("zz",))
    assert len(text["choices"][0]["text"]) == 3
    assert [(m["id"], m["owned_by"]) for m in models] == [("far", "remote")]
    assert ready.status_code == 200


async def test_a_remote_server_that_is_gone_or_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    async with front(f"http://127.0.0.1:{free_port()}/v1", monkeypatch) as client:
        gone = await client.post("/v1/chat/completions", json=BODY)
    async with http_edge() as far:
        await worker_of(far)
        async with front(f"{far.url}/v1", monkeypatch) as client:
            too_long = await client.post("/v1/chat/completions", json=BODY | {"max_tokens": 4000})
            logprobs = await client.post("/v1/chat/completions", json=BODY | {"logprobs": True})
        async with front(f"{far.url}/v1", monkeypatch, key="wrong-key-of-sixteen-chars") as client:
            unauthorised = await client.post("/v1/chat/completions", json=BODY)
    assert gone.status_code == 503
    assert too_long.status_code == logprobs.status_code == 400
    assert logprobs.json()["error"]["param"] == "logprobs"
    assert unauthorised.status_code == 503  # our key, not the client's: nothing for it to mend
    assert API_KEY not in unauthorised.text


async def test_a_client_that_leaves_ends_the_remote_request(monkeypatch: pytest.MonkeyPatch) -> None:
    async with http_edge() as far, front(f"{far.url}/v1", monkeypatch) as client:
        worker = await worker_of(far, pace_s=0.02, answer_tokens=400)
        async with client.stream("POST", "/v1/chat/completions", json=BODY | {"stream": True, "max_tokens": 400}):
            await assert_eventually(lambda: worker.running == 1)
        await assert_eventually(lambda: worker.running == 0, timeout_s=1)


async def test_a_stream_that_breaks_off_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    async with http_edge() as far, front(f"{far.url}/v1", monkeypatch) as client:
        await worker_of(far, die_after=3)
        reply = await client.post("/v1/chat/completions", json=BODY | {"stream": True})
    assert "[DONE]" not in reply.text
    assert '"error"' in reply.text


async def test_functions_and_json_formats_are_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
    async with http_edge() as far, front(f"{far.url}/v1", monkeypatch) as client:
        worker = await worker_of(far, script='<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>')
        reply = await client.post("/v1/chat/completions", json=BODY | {"tools": [tool], "tool_choice": "required"})
        called = reply.json()["choices"][0]
        form = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "object"}}}
        await client.post("/v1/chat/completions", json=BODY | {"response_format": form})
        odd = await client.post(
            "/v1/chat/completions", json=BODY | {"response_format": {"type": "regex", "regex": "a"}}
        )
    assert called["finish_reason"] == "tool_calls"
    assert called["message"]["tool_calls"][0]["function"] == {"name": "f", "arguments": "{}"}
    assert "structural_tag" in worker.seen[0].grammar
    assert worker.seen[1].grammar == '{"json_schema":{"type":"object"}}'
    assert (odd.status_code, odd.json()["error"]["param"]) == (400, "response_format")
