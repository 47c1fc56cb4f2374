"""Bytes that no client of ours would send: always a typed error of the caller's, never one of ours, never an end."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import anyio.from_thread
import httpx
import pytest
from anyio.from_thread import BlockingPortal
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from covey.cli.mesh import Mesh
from covey.codec.methods import (
    Decode,
    Flow,
    Inference,
    KvStore,
    Method,
    Prefill,
    Programs,
    SemCache,
    ServerStream,
    Tools,
    Unary,
)
from covey.errors import CoveyError, Internal, Unavailable
from covey.net.grpc_transport import GrpcTransport
from tests.support.meshes import TINY, chat_body
from tests.support.probe import api_key

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(180), pytest.mark.xdist_group("security-mesh")]


def examples(count: int) -> settings:
    """So many examples, the same in each run: what they find, they find for everybody."""
    quiet = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
    return settings(max_examples=count, derandomize=True, database=None, deadline=None, suppress_health_check=quiet)


PATHS = ("/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/tokenize")
GOOD = chat_body(TINY, "hello", max_tokens=2)
FIELDS = (*GOOD, "stop", "n", "seed", "logit_bias", "top_p", "stream", "stream_options", "response_format", "user",
          "top_logprobs", "logprobs", "priority", "min_tokens", "max_completion_tokens")  # fmt: skip
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(FIELDS) | st.text(max_size=8), inner),
    max_leaves=12,
)


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes((*out, value))


def _number(tag: int, value: int) -> bytes:
    return _varint(tag << 3) + _varint(value)


def _chunk(tag: int, value: bytes) -> bytes:
    return _varint(tag << 3 | 2) + _varint(len(value)) + value


def _fixed(tag: int, value: bytes) -> bytes:
    return _varint(tag << 3 | 1) + value


TAGS = st.integers(1, 14)
NUMBERS = st.sampled_from((0, 1, 2, 16, 2**31, 2**63, 2**64 - 1)) | st.integers(0, 2**64 - 1)
TEXTS = st.sampled_from((b"", b"a", TINY.encode(), b"local", b"x" * 32, b"{{x}}", b"\xff")) | st.binary(max_size=40)
MESSAGES = st.recursive(
    st.builds(_number, TAGS, NUMBERS)
    | st.builds(_chunk, TAGS, TEXTS)
    | st.builds(_fixed, TAGS, st.binary(min_size=8, max_size=8)),
    lambda inner: st.builds(_chunk, TAGS, st.lists(inner, max_size=5).map(b"".join)),
    max_leaves=8,
)
"""Fields of protobuf's wire format: most messages made of them are well-formed, and few of them make sense."""


@pytest.fixture(scope="module")
def client(mesh: Mesh) -> Iterator[httpx.Client]:
    headers = {"Authorization": f"Bearer {api_key(mesh)}", "Content-Type": "application/json"}
    with httpx.Client(base_url=mesh.http, headers=headers, trust_env=False, timeout=20) as client:
        yield client


def is_ours_to_give(response: httpx.Response) -> None:
    """Assert an answer, or a typed error of the caller's."""
    if response.status_code == httpx.codes.OK:
        return
    assert 400 <= response.status_code < 500, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] in {"invalid_request_error", "not_found_error"}
    assert error["message"]


@examples(60)
@given(
    path=st.sampled_from(["/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/tokenize"]),
    body=st.binary(max_size=400),
)
def test_any_bytes_as_a_body(client: httpx.Client, path: str, body: bytes) -> None:
    response = client.post(path, content=body)
    is_ours_to_give(response)
    assert response.status_code != httpx.codes.OK


@examples(100)
@given(field=st.sampled_from(FIELDS), value=JSON)
def test_any_value_in_any_field(client: httpx.Client, field: str, value: Any) -> None:
    if field in ("max_tokens", "max_completion_tokens") and isinstance(value, int) and not isinstance(value, bool):
        value = min(value, 4)  # a long answer would only take time
    body = GOOD | {field: value}
    if field == "max_tokens" and value is None:
        body["max_completion_tokens"] = 2
    is_ours_to_give(client.post("/v1/chat/completions", content=json.dumps(body)))


@examples(40)
@given(st.integers(0, 200), st.binary(min_size=1, max_size=3))
def test_a_broken_byte_in_a_good_body(client: httpx.Client, at: int, junk: bytes) -> None:
    body = json.dumps(GOOD).encode()
    is_ours_to_give(client.post("/v1/chat/completions", content=body[:at] + junk + body[at + len(junk) :]))


INNER = "mesh.token"
RPCS: tuple[tuple[str, Method[Any, Any]], ...] = (
    ("gateway-0", Inference.CHAT),
    ("gateway-0", Inference.EMBED),
    ("gateway-0", Programs.SUBMIT),
    ("gateway-0", Programs.GET),
    ("gateway-0", Programs.CANCEL),
    ("agentflow-0", Flow.SUBMIT),
    ("agentflow-0", Flow.WATCH),
    ("agentflow-0", Tools.ATTACH),
    ("prefill-0", Prefill.GENERATE),
    ("decode-0", Decode.GENERATE),
    ("decode-0", Decode.RETAIN),
    ("decode-0", Decode.ADOPT),
    ("kvstore-0", KvStore.LOOKUP),
    ("kvstore-0", KvStore.RESERVE),
    ("kvstore-0", KvStore.COMMIT),
    ("kvstore-0", KvStore.GET),
    ("semcache-0", SemCache.LOOKUP),
    ("semcache-0", SemCache.OFFER),
)


class Wire:
    """Sends raw bytes as requests; what comes back is counted, what is raised is the server's."""

    def __init__(self, mesh: Mesh) -> None:
        self._mesh = mesh
        self._transports: dict[str, GrpcTransport] = {}

    async def send(self, name: str, method: Method[Any, Any], data: bytes) -> CoveyError | None:
        child = self._mesh.children[name]
        transport = self._transports.get(name)
        if transport is None:
            transport = self._transports[name] = GrpcTransport(child.addresses["grpc"], message_bytes_max=1 << 20)
        is_edge = name.startswith(("gateway", "agentflow"))
        secret = api_key(self._mesh) if is_edge else (self._mesh.plan.files.run_dir / INNER).read_text().strip()
        headers = {"authorization": f"Bearer {secret}"}
        try:
            if isinstance(method, Unary):
                await transport.unary(method.path, data, timeout_s=10, headers=headers)
            elif isinstance(method, ServerStream):
                await transport.stream(method.path, data, timeout_s=10, headers=headers).receive()
            else:
                call = transport.exchange(method.path, timeout_s=10, headers=headers)
                await call.send(data)
                await call.done_sending()
                await call.receive()
        except CoveyError as error:
            return error
        return None

    async def aclose(self) -> None:
        for transport in self._transports.values():
            await transport.aclose()


@pytest.fixture(scope="module")
def wired(mesh: Mesh) -> Iterator[tuple[BlockingPortal, Wire]]:
    wire = Wire(mesh)
    with anyio.from_thread.start_blocking_portal() as portal:
        yield portal, wire
        portal.call(wire.aclose)


@examples(400)
@given(rpc=st.sampled_from(RPCS), data=st.binary(max_size=200) | st.lists(MESSAGES, max_size=12).map(b"".join))
def test_any_bytes_as_a_message(
    mesh: Mesh, wired: tuple[BlockingPortal, Wire], rpc: tuple[str, Method[Any, Any]], data: bytes
) -> None:
    portal, wire = wired
    name, method = rpc
    error = portal.call(wire.send, name, method, data)
    assert not isinstance(error, Internal | Unavailable), (method.path, error)
    assert mesh.children[name].running


@pytest.mark.parametrize("rpc", RPCS, ids=lambda rpc: rpc[1].path.rpartition(".")[2])
def test_an_empty_message(mesh: Mesh, wired: tuple[BlockingPortal, Wire], rpc: tuple[str, Method[Any, Any]]) -> None:
    """Every field at its default: often the least expected message of all."""
    portal, wire = wired
    error = portal.call(wire.send, *rpc, b"")
    assert not isinstance(error, Internal | Unavailable), error


def test_the_mesh_still_answers(mesh: Mesh, client: httpx.Client) -> None:
    assert all(child.running for child in mesh.children.values())
    assert client.post("/v1/chat/completions", json=GOOD).status_code == httpx.codes.OK
    logs = (mesh.plan.files.run_dir / "logs").iterdir()
    failed = [line for log in logs for line in log.read_text(errors="replace").splitlines() if " failed path=" in line]
    assert not failed, failed[0]
