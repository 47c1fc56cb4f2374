"""Bad input at every edge: a typed error that names the field, nothing reaches an engine, nothing leaks."""

from __future__ import annotations

import json
import math
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import anyio
import httpx
import psutil
import pytest

from covey.auth import MeshToken
from covey.cli.mesh import Mesh
from covey.clock import MonotonicClock
from covey.codec.methods import Flow, Inference, Programs
from covey.errors import AlreadyExists, ContextLengthExceeded, CoveyError, InvalidArgument, NotFound, PayloadTooLarge
from covey.net.rpc import Channel
from covey.testing import assert_eventually
from covey.types.flow import LlmNode, Node, SubmitRun, Workflow
from covey.types.ids import CallId, ProgramId
from covey.types.program import (
    CallParams,
    ChatRequest,
    CompleteRequest,
    Message,
    OpenProgram,
    ProgramHandle,
    SemanticCall,
    SubmitCalls,
)
from tests.support.meshes import TINY
from tests.support.probe import api_key, mesh_in_thread, probing

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(180)]

TURN = {"role": "user", "content": "hello"}
CHAT = {"model": TINY, "messages": [TURN], "max_tokens": 4, "temperature": 0, "cache": "bypass"}
MIB = 1 << 20
RSS_GROWTH_MAX = 12 * MIB
INTERNALS = ("Traceback", 'File "', "site-packages", "covey/", "services/", "msgspec", "object at 0x", "reference")


@pytest.fixture(scope="module")
def mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mesh]:
    with mesh_in_thread(tmp_path_factory.mktemp("bad")) as mesh:
        yield mesh


@asynccontextmanager
async def untouched(mesh: Mesh) -> AsyncIterator[None]:
    """Assert that during the block no engine computes, no store is asked, and that nothing is held after it."""
    async with probing(mesh) as probe:
        before = await probe.work()
        yield
        assert await probe.work() == before, "bad input reached an engine or a store"
        await assert_eventually(probe.holds_nothing, timeout_s=5)


@asynccontextmanager
async def web(mesh: Mesh) -> AsyncIterator[httpx.AsyncClient]:
    """An HTTP client with the tenant's key."""
    headers = {"Authorization": f"Bearer {api_key(mesh)}", "Content-Type": "application/json"}
    async with httpx.AsyncClient(base_url=mesh.http, headers=headers, trust_env=False, timeout=30) as client:
        yield client


@pytest.fixture(autouse=True)
def _no_blocking() -> None:
    """Off: a test's process only watches here, and grpc's channels lock when they are collected."""


def chat(**fields: Any) -> bytes:
    return json.dumps(CHAT | fields).encode()


def without(name: str) -> bytes:
    return json.dumps({k: v for k, v in CHAT.items() if k != name}).encode()


BAD_CHATS: dict[str, tuple[bytes, int, str, str | None]] = {
    "a prompt over the context": (
        chat(messages=[{"role": "user", "content": "x" * 5000}]), 400, "context_length_exceeded", "messages",
    ),
    "prompt and answer over the context": (chat(max_tokens=2040), 400, "context_length_exceeded", "messages"),
    "negative max_tokens": (chat(max_tokens=-1), 400, "invalid_argument", "max_tokens"),
    "no max_tokens at all": (chat(max_tokens=0), 400, "invalid_argument", "max_tokens"),
    "two limits": (chat(max_completion_tokens=5), 400, "invalid_argument", "max_tokens"),
    "an unknown model": (chat(model="nobody"), 404, "model_not_found", "model"),
    "no model": (without("model"), 400, "invalid_argument", "model"),
    "no messages": (without("messages"), 400, "invalid_argument", "messages"),
    "empty messages": (chat(messages=[]), 400, "invalid_argument", "messages"),
    "an unknown field": (chat(flavour="mint"), 400, "unknown_parameter", "flavour"),
    "an unknown inner field": (chat(messages=[TURN | {"mood": 1}]), 400, "unknown_parameter", "messages[0].mood"),
    "a field not supported yet": (chat(audio={}), 400, "unsupported_parameter", "audio"),
    "no tools": (chat(tools=[]), 400, "invalid_argument", "tools"),
    "an unknown role": (chat(messages=[TURN | {"role": "boss"}]), 400, "invalid_argument", "messages[0].role"),
    "a wrong type": (chat(stream="yes"), 400, "invalid_argument", "stream"),
    "a hot temperature": (chat(temperature=3), 400, "invalid_argument", "temperature"),
    "an infinite temperature": (chat().replace(b'ture": 0', b'ture": 1e999'), 400, "invalid_argument", "temperature"),
    "NaN": (chat(temperature=math.nan), 400, "invalid_argument", None),
    "100,000 stops": (chat(stop=["stop"] * 100_000), 400, "invalid_argument", "stop"),
    "an empty stop": (chat(stop=""), 400, "invalid_argument", "stop"),
    "too many choices": (chat(n=1000), 400, "invalid_argument", "n"),
    "no such token": (chat(logit_bias={"99999": 1}), 400, "invalid_argument", "logit_bias"),
    "top_logprobs alone": (chat(top_logprobs=2), 400, "invalid_argument", "top_logprobs"),
    "a seed over 64 bits": (chat(seed=2**70), 400, "invalid_argument", "seed"),
    "deep JSON": (b"[" * 100_000, 400, "invalid_argument", None),
    "a deep field": (chat().replace(b'"hello"', b"[" * 50_000 + b"]" * 50_000), 400, "invalid_argument", None),
    "broken JSON": (b'{"model": ', 400, "invalid_argument", None),
    "nothing": (b"", 400, "invalid_argument", None),
    "no object": (b"[1, 2]", 400, "invalid_argument", None),
    "no text": (b'{"model": "\xff\xfe"}', 400, "invalid_argument", None),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_CHATS)
async def test_a_bad_chat_is_refused_by_name(name: str, mesh: Mesh) -> None:
    body, status, code, param = BAD_CHATS[name]
    async with untouched(mesh), web(mesh) as http:
        refused(await http.post("/v1/chat/completions", content=body), status, code, param)


@pytest.mark.parametrize(
    ("change", "code", "param"),
    [
        ({"prompt": "x" * 5000}, "context_length_exceeded", "prompt"),
        ({"prompt": []}, "invalid_argument", "prompt"),
        ({"prompt": ""}, "invalid_argument", "prompt"),
        ({"prompt": ["a", 1]}, "invalid_argument", "prompt"),
        ({"prompt": [99_999]}, "invalid_argument", "prompt"),
        ({"prompt": [-1]}, "invalid_argument", "prompt"),
        ({"prompt": ["a"] * 200}, "invalid_argument", "n"),
        ({"prompt": "a", "logprobs": 99}, "invalid_argument", "logprobs"),
    ],
)
async def test_a_bad_completion_is_refused_by_name(change: dict[str, Any], code: str, param: str, mesh: Mesh) -> None:
    body = {"model": TINY, "max_tokens": 4, "cache": "bypass"} | change
    async with untouched(mesh), web(mesh) as http:
        refused(await http.post("/v1/completions", json=body), 400, code, param)


def refused(response: httpx.Response, status: int, code: str, param: str | None) -> None:
    """Assert an error in OpenAI's shape that names the field and nothing of ours."""
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert (error["code"], error["param"]) == (code, param), error
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] in {"invalid_request_error", "not_found_error"}
    assert response.headers["x-should-retry"] == "false"
    is_clean(error["message"])


def is_clean(message: str) -> None:
    assert 0 < len(message) < 1024
    assert not [text for text in INTERNALS if text in message], message


async def test_a_huge_body_is_refused_by_its_announced_length(mesh: Mesh) -> None:
    async with untouched(mesh):
        answer, sent = await anyio.to_thread.run_sync(_post_slowly, mesh, f"Content-Length: {100 * MIB}", MIB)
    assert answer.startswith(b"HTTP/1.1 413 "), answer
    assert b'"code":"payload_too_large"' in answer
    assert sent <= MIB


async def test_a_huge_body_of_unknown_length_is_refused_while_it_comes(mesh: Mesh) -> None:
    gateway = psutil.Process(mesh.children["gateway-0"].pid)
    before = gateway.memory_info().rss
    async with untouched(mesh):
        answer, sent = await anyio.to_thread.run_sync(_post_slowly, mesh, "Transfer-Encoding: chunked", 100 * MIB)
    assert answer.startswith(b"HTTP/1.1 413 "), answer
    assert sent < 64 * MIB, "the answer came only after most of the body"
    assert gateway.memory_info().rss - before < 64 * MIB


def _post_slowly(mesh: Mesh, framing: str, bytes_max: int) -> tuple[bytes, int]:
    """Send a body piece by piece until an answer is there; return the answer and how much was sent."""
    host, _, port = mesh.http.removeprefix("http://").partition(":")
    head = (
        f"POST /v1/chat/completions HTTP/1.1\r\nHost: {host}\r\nAuthorization: Bearer {api_key(mesh)}\r\n"
        f"Content-Type: application/json\r\n{framing}\r\n\r\n"
    )
    piece = b" " * (256 << 10)
    framed = f"{len(piece):x}\r\n".encode() + piece + b"\r\n" if "chunked" in framing else piece
    sent = 0
    with socket.create_connection((host, int(port)), timeout=10) as client:
        client.sendall(head.encode())
        while sent < bytes_max:
            client.settimeout(0.02)
            try:
                return _answer(client), sent
            except TimeoutError:
                client.settimeout(10)
                client.sendall(framed)
                sent += len(piece)
        return _answer(client), sent


def _answer(client: socket.socket) -> bytes:
    """Head and body of a response; TimeoutError when none has begun."""
    answer = client.recv(65536)
    client.settimeout(10)
    while b"}" not in answer and (more := client.recv(65536)):
        answer += more
    return answer


def say(**params: Any) -> ChatRequest:
    return ChatRequest(
        model=TINY, messages=(Message(role="user", content="hello"),), params=CallParams(**{"max_tokens": 4, **params})
    )


LONG = Message(role="user", content="x" * 5000)
BAD_RPC_CHATS: dict[str, tuple[ChatRequest | CompleteRequest, type[CoveyError], str]] = {
    "a prompt over the context": (replace(say(), messages=(LONG,)), ContextLengthExceeded, "messages"),
    "a text over the context": (
        CompleteRequest(model=TINY, prompt="x" * 5000, params=CallParams(max_tokens=4)),
        ContextLengthExceeded,
        "prompt",
    ),
    "no messages": (replace(say(), messages=()), InvalidArgument, "messages"),
    "an unknown role": (
        replace(say(), messages=(Message(role="boss", content="x"),)),
        InvalidArgument,
        "messages[0].role",
    ),
    "an unknown model": (replace(say(), model="nobody"), NotFound, "model"),
    "negative max_tokens": (say(max_tokens=-1), InvalidArgument, "params.max_tokens"),
    "no max_tokens at all": (say(max_tokens=0), InvalidArgument, "params.max_tokens"),
    "NaN": (say(temperature=math.nan), InvalidArgument, "params.temperature"),
    "100,000 stops": (say(stop=("stop",) * 100_000), InvalidArgument, "params.stop"),
    "an empty stop": (say(stop=("",)), InvalidArgument, "stop"),
    "a long stop": (say(stop=("x" * 10_000,)), InvalidArgument, "stop"),
    "no such token": (say(logit_bias={99_999: 1.0}), InvalidArgument, "logit_bias"),
    "a bias that is no number": (say(logit_bias={1: math.nan}), InvalidArgument, "logit_bias"),
    "too many choices": (say(n=1000), InvalidArgument, "params.n"),
}


@asynccontextmanager
async def edge(mesh: Mesh) -> AsyncIterator[Channel]:
    """A channel to the gateway with the tenant's key, that would carry far more than the gateway takes."""
    token = MeshToken(api_key(mesh))
    async with Channel.open(mesh.grpc, token=token, message_bytes_max=32 * MIB) as channel:
        yield channel


@pytest.mark.parametrize("name", BAD_RPC_CHATS)
async def test_a_bad_chat_over_grpc_is_refused_by_name(name: str, mesh: Mesh) -> None:
    request, error, field = BAD_RPC_CHATS[name]
    method: Any = Inference.CHAT if isinstance(request, ChatRequest) else Inference.COMPLETE
    async with untouched(mesh), edge(mesh) as gateway:
        with pytest.raises(error) as raised:
            async with gateway.stream(method, request, timeout_s=10) as events:
                async for _ in events:
                    pass
    named(raised.value, field)


def named(error: CoveyError, field: str) -> None:
    assert (error.field or "").endswith(field), (error.field, error.message)
    is_clean(error.message)


async def test_a_huge_message_over_grpc_is_refused(mesh: Mesh) -> None:
    request = replace(say(), messages=(Message(role="user", content="x" * (3 * MIB)),) * 4)
    async with untouched(mesh), edge(mesh) as gateway:
        with pytest.raises(PayloadTooLarge):
            async with gateway.stream(Inference.CHAT, request, timeout_s=20) as events:
                await anext(events)


def call(call_id: str, output: str, content: str = "hello", **params: Any) -> SemanticCall:
    return SemanticCall(
        call_id=CallId(call_id),
        messages=(Message(role="user", content=content),),
        output=output,
        params=CallParams(**{"max_tokens": 4, **params}),
    )


BAD_CALLS: dict[str, tuple[tuple[SemanticCall, ...], dict[str, str], type[CoveyError], str]] = {
    "a cycle": ((call("a", "x", "{{y}}"), call("b", "y", "{{x}}")), {}, InvalidArgument, "calls[0].messages"),
    "itself": ((call("a", "x", "{{x}}"),), {}, InvalidArgument, "calls[0].messages"),
    "an unknown variable": ((call("a", "x", "{{nobody}}"),), {}, InvalidArgument, "calls[0].messages"),
    "two producers": ((call("a", "x"), call("b", "x")), {}, InvalidArgument, "calls[1].output"),
    "a value and a producer": ((call("a", "x"),), {"x": "1"}, InvalidArgument, "calls[0].output"),
    "an id twice": ((call("a", "x"), call("a", "y")), {}, InvalidArgument, "calls[1].call_id"),
    "no id": ((call("", "x"),), {}, InvalidArgument, "calls[0].call_id"),
    "a bad name": ((call("a", "no name"),), {}, InvalidArgument, "calls[0].output"),
    "a bad variable": ((), {"no name": ""}, InvalidArgument, "variables"),
    "negative max_tokens": ((call("a", "x", max_tokens=-1),), {}, InvalidArgument, "params.max_tokens"),
    "two answers": ((call("a", "x", n=2),), {}, InvalidArgument, "calls[0].params.n"),
    "an unknown model": ((replace(call("a", "x"), model="nobody"),), {}, NotFound, "calls[0].model"),
}


@pytest.mark.parametrize("name", BAD_CALLS)
async def test_a_bad_program_is_refused_by_name(name: str, mesh: Mesh) -> None:
    calls, variables, error, field = BAD_CALLS[name]
    async with untouched(mesh), edge(mesh) as gateway:
        handle: ProgramHandle = await gateway.call(Programs.OPEN, OpenProgram(), timeout_s=5)
        request = SubmitCalls(program_id=handle.program_id, calls=calls, variables=variables)
        with pytest.raises(error) as raised:
            await gateway.call(Programs.SUBMIT, request, timeout_s=5)
    named(raised.value, field)


async def test_a_known_call_with_another_body_and_an_unknown_program_are_refused(mesh: Mesh) -> None:
    async with probing(mesh) as probe, edge(mesh) as gateway:
        handle: ProgramHandle = await gateway.call(Programs.OPEN, OpenProgram(), timeout_s=5)
        first = SubmitCalls(program_id=handle.program_id, calls=(call("a", "x"),))
        await gateway.call(Programs.SUBMIT, first, timeout_s=5)
        with pytest.raises(AlreadyExists) as raised:
            await gateway.call(Programs.SUBMIT, replace(first, calls=(call("a", "x", "other"),)), timeout_s=5)
        named(raised.value, "calls")
        with pytest.raises(NotFound) as missing:
            await gateway.call(Programs.SUBMIT, replace(first, program_id=ProgramId("prog-none")), timeout_s=5)
        named(missing.value, "program_id")
        await assert_eventually(probe.holds_nothing, timeout_s=10)


def node(node_id: str, content: str = "hello", after: tuple[str, ...] = (), **params: Any) -> Node:
    params = {"max_tokens": 4, **params}
    work = LlmNode(messages=(Message(role="user", content=content),), params=CallParams(**params))
    return Node(id=node_id, work=work, after=after)


BAD_FLOWS: dict[str, tuple[tuple[Node, ...], dict[str, str], str]] = {
    "a cycle": ((node("a", "{{b}}"), node("b", "{{a}}")), {}, "workflow.nodes.a"),
    "a cycle of order": ((node("a", after=("b",)), node("b", after=("a",))), {}, "workflow.nodes.a"),
    "itself": ((node("a", "{{a}}"),), {}, "workflow.nodes.a"),
    "an unknown variable": ((node("a", "{{nobody}}"),), {}, "workflow.nodes.a.messages[0]"),
    "an unknown predecessor": ((node("a", after=("nobody",)),), {}, "workflow.nodes.a.after"),
    "an id twice": ((node("a"), node("a", "other")), {}, "workflow.nodes.a"),
    "a node and an input": ((node("a"),), {"a": "1"}, "workflow.nodes.a"),
    "no nodes": ((), {}, "workflow.nodes"),
    "a bad name": ((node("no name"),), {}, "workflow.nodes.no name"),
    "negative max_tokens": ((node("a", max_tokens=-1),), {}, "params.max_tokens"),
}


@pytest.mark.parametrize("name", BAD_FLOWS)
async def test_a_bad_workflow_is_refused_by_name(name: str, mesh: Mesh) -> None:
    nodes, inputs, field = BAD_FLOWS[name]
    async with untouched(mesh), Channel.open(mesh.flow, token=MeshToken(api_key(mesh))) as flow:
        request = SubmitRun(workflow=Workflow(name="bad", nodes=nodes), inputs=inputs)
        with pytest.raises(InvalidArgument) as raised:
            await flow.call(Flow.SUBMIT, request, timeout_s=5)
    named(raised.value, field)


async def test_a_refusal_comes_at_once(mesh: Mesh) -> None:
    """Head and body leave in one go: with Nagle's algorithm the body would wait 40 ms for an acknowledgement."""
    clock, body, waits = MonotonicClock(), chat(max_tokens=-1), []
    async with web(mesh) as http:
        for _ in range(8):
            began = clock.now()
            assert (await http.post("/v1/chat/completions", content=body)).status_code == httpx.codes.BAD_REQUEST
            waits.append(clock.now() - began)
    assert min(waits) < 0.03


async def test_memory_stays_flat_over_bad_requests(mesh: Mesh) -> None:
    gateway = psutil.Process(mesh.children["gateway-0"].pid)
    bodies = [body for body, *_ in BAD_CHATS.values()]

    async def send(http: httpx.AsyncClient, count: int) -> None:
        for i in range(count):
            response = await http.post("/v1/chat/completions", content=bodies[i % len(bodies)])
            assert 400 <= response.status_code < 500

    async with untouched(mesh), web(mesh) as http:
        await send(http, 100)
        before = gateway.memory_info().rss
        await send(http, 200)
        assert gateway.memory_info().rss - before < RSS_GROWTH_MAX


async def test_a_good_request_is_counted(mesh: Mesh) -> None:
    """The control: the counters that bad input leaves alone do move."""
    async with probing(mesh) as probe, web(mesh) as http:
        before = await probe.work()
        response = await http.post("/v1/chat/completions", content=chat())
        assert response.status_code == httpx.codes.OK, response.text
        after = await probe.work()
        assert after.steps > before.steps
        assert after.computed_tokens > before.computed_tokens
        await assert_eventually(probe.holds_nothing, timeout_s=10)
