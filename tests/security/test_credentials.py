"""Who may call: every wrong credential gets the same answer at every door, and none of them reaches a log."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import httpx
import pytest

from covey.auth import MeshToken
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
    Unary,
)
from covey.errors import CoveyError, Unauthenticated
from covey.net.grpc_transport import GrpcTransport
from covey.net.rpc import Channel
from covey.types.common import Empty
from covey.types.flow import ListRuns, LlmNode, Node, SubmitRun, WaitRun, Workflow
from covey.types.program import (
    CallParams,
    ChatRequest,
    GetVariable,
    Message,
    Objective,
    OpenProgram,
    SetVariable,
)
from tests.support.meshes import TINY, chat_body, client_of
from tests.support.probe import api_key, probing

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(120), pytest.mark.xdist_group("security-mesh")]

CANARY = "canary-4b1d90"
PATHS = ("/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/tokenize")


def _unsigned_jwt() -> str:
    parts = ({"alg": "none", "typ": "JWT"}, {"sub": "local", "tenant": "local"})
    return ".".join(base64.urlsafe_b64encode(json.dumps(part).encode()).decode().rstrip("=") for part in parts) + "."


def wrong_credentials(mesh: Mesh) -> dict[str, str | None]:
    """Every way to be nobody, by name; None sends no header."""
    key, mesh_token = api_key(mesh), (mesh.plan.files.run_dir / "mesh.token").read_text().strip()
    return {
        "none": None,
        "empty": "",
        "wrong": "Bearer ck-" + CANARY * 4,
        "one character off": f"Bearer {key[:-1]}{'A' if key[-1] != 'A' else 'B'}",
        "a beginning": f"Bearer {key[:-1]}",
        "more": f"Bearer {key}x",
        "twice": f"Bearer {key} {key}",
        "no scheme": key,
        "no key": "Bearer",
        "another scheme": f"Basic {base64.b64encode(f'local:{key}'.encode()).decode()}",
        "a scheme of ours alone": f"Token {key}",
        "the mesh's own token": f"Bearer {mesh_token}",
        "alg none": f"Bearer {_unsigned_jwt()}",
        "too long": "Bearer " + CANARY * 400,
    }


async def test_every_wrong_key_gets_the_same_answer_over_http(mesh: Mesh) -> None:
    answers: dict[tuple[object, ...], list[str]] = {}
    async with httpx.AsyncClient(base_url=mesh.http, trust_env=False, timeout=10) as client:
        for name, credential in wrong_credentials(mesh).items():
            headers = {"x-request-id": "r", **({} if credential is None else {"Authorization": credential})}
            for path in PATHS:
                response = await client.post(path, json=chat_body(TINY, CANARY), headers=headers)
                shown = {k: v for k, v in response.headers.items() if k != "date"}
                answers.setdefault((response.status_code, response.content, tuple(shown.items())), []).append(name)
            models = await client.get("/v1/models", headers=headers)
            assert models.status_code == httpx.codes.UNAUTHORIZED
    assert len(answers) == 1, answers
    (status, content, _), _ = answers.popitem()
    assert status == httpx.codes.UNAUTHORIZED
    assert json.loads(str(content, "utf-8") if isinstance(content, bytes) else "")["error"] == {
        "message": "the API key is missing or wrong: send `Authorization: Bearer <key>`",
        "type": "authentication_error",
        "param": None,
        "code": "invalid_api_key",
    }


async def test_the_body_is_not_read_before_the_key_is_known(mesh: Mesh) -> None:
    async with httpx.AsyncClient(base_url=mesh.http, trust_env=False, timeout=10) as client:
        for content in (b"", b"not json", b"[" * 100_000, json.dumps({"model": "nobody"}).encode()):
            response = await client.post(PATHS[0], content=content)
            assert response.status_code == httpx.codes.UNAUTHORIZED


async def test_a_key_elsewhere_than_in_the_header_is_no_key(mesh: Mesh) -> None:
    key = api_key(mesh)
    async with httpx.AsyncClient(base_url=mesh.http, trust_env=False, timeout=10) as client:
        for sent in (
            await client.get("/v1/models", params={"api_key": key}),
            await client.get("/v1/models", headers={"x-api-key": key}),
            await client.get("/v1/models", headers={"cookie": f"authorization={key}"}),
        ):
            assert sent.status_code == httpx.codes.UNAUTHORIZED
        good = await client.get("/v1/models", headers={"Authorization": f"bearer {key}"})
        assert good.status_code == httpx.codes.OK, "the scheme's case does not matter"


async def refusal(address: str, method: Method[Any, Any], credential: str | None) -> CoveyError:
    """What a bare call with this header is answered with."""
    transport = GrpcTransport(address, message_bytes_max=1 << 20)
    headers = {} if credential is None else {"authorization": credential}
    try:
        if isinstance(method, ServerStream):
            await transport.stream(method.path, b"", timeout_s=5, headers=headers).receive()
        else:
            await transport.unary(method.path, b"", timeout_s=5, headers=headers)
    except CoveyError as error:
        return error
    finally:
        await transport.aclose()
    raise AssertionError(f"{method.path} answered a stranger")


async def test_every_wrong_key_gets_the_same_answer_over_grpc(mesh: Mesh) -> None:
    doors: tuple[tuple[str, Method[Any, Any]], ...] = (
        (mesh.grpc, Inference.MODELS),
        (mesh.grpc, Inference.CHAT),
        (mesh.grpc, Programs.OPEN),
        (mesh.flow, Flow.LIST),
    )
    said = set()
    for credential in wrong_credentials(mesh).values():
        for address, method in doors:
            error = await refusal(address, method, credential)
            assert type(error) is Unauthenticated, (method.path, error)
            said.add((error.message, error.field))
    assert len(said) == 1, said


async def test_inner_services_want_the_mesh_token(mesh: Mesh) -> None:
    doors: dict[str, tuple[Unary[Any, Any] | ServerStream[Any, Any], ...]] = {
        "prefill-0": (Prefill.LOAD, Prefill.GENERATE),
        "decode-0": (Decode.LOAD, Decode.GENERATE),
        "kvstore-0": (KvStore.STATS, KvStore.SNAPSHOT, KvStore.LOOKUP),
        "semcache-0": (SemCache.STATS, SemCache.LOOKUP),
    }
    strangers = wrong_credentials(mesh)
    del strangers["the mesh's own token"]
    strangers["a tenant's key"] = f"Bearer {api_key(mesh)}"
    for name, methods in doors.items():
        address = mesh.children[name].addresses["grpc"]
        for method in methods:
            for credential in (
                strangers[n] for n in ("none", "wrong", "no scheme", "another scheme", "a tenant's key")
            ):
                error = await refusal(address, method, credential)
                assert type(error) is Unauthenticated, (name, method.path, error)
        async with probing(mesh) as probe:  # the control: the token opens it
            opened = methods[0]
            assert isinstance(opened, Unary)
            await probe.to(name).call(opened, Empty(), timeout_s=5)


async def test_the_mesh_token_alone_is_no_tenant_at_the_edge(mesh: Mesh) -> None:
    token = MeshToken((mesh.plan.files.run_dir / "mesh.token").read_text())
    async with Channel.open(mesh.grpc, token=token) as channel:
        with pytest.raises(Unauthenticated):
            await channel.call(Inference.MODELS, Empty(), timeout_s=5)
        named = {"x-covey-tenant": "local"}
        assert (await channel.call(Inference.MODELS, Empty(), timeout_s=5, headers=named)).models
    async with Channel.open(mesh.flow, token=token) as channel:
        with pytest.raises(Unauthenticated):
            await channel.call(Flow.LIST, ListRuns(), timeout_s=5, headers={"x-covey-tenant": "local"})


async def test_no_key_and_no_text_reaches_a_log(mesh: Mesh) -> None:
    for speak in (_speak_http, _speak_programs, _speak_flow, _speak_wrongly):
        await speak(mesh)
    secrets = [api_key(mesh)]
    secrets += [path.read_text().strip() for path in mesh.plan.files.run_dir.rglob("*token*") if path.is_file()]
    secrets += [(mesh.plan.files.run_dir / "chain.secret").read_text().strip()]
    assert len(secrets) >= 4
    logs = list((mesh.plan.files.run_dir / "logs").iterdir()) + list(mesh.plan.files.run_dir.rglob("*.log"))
    texts = {path: path.read_text(errors="replace") for path in set(logs)}
    assert sum('"event": "ready"' in text for text in texts.values()) == len(mesh.children), "these are not the logs"
    for path, text in texts.items():
        for secret in (CANARY, *secrets):
            assert secret not in text, _context(path, text, secret)


def _context(path: Path, text: str, secret: str) -> str:
    at = text.index(secret)
    return f"{path.name}: …{text[max(0, at - 300) : at + 40]}…"


async def _speak_http(mesh: Mesh) -> None:
    async with client_of(mesh) as client:
        for cache in ("use", "use", "bypass"):
            body = chat_body(TINY, f"{CANARY} hello", max_tokens=4) | {"cache": cache}
            assert (await client.post(PATHS[0], json=body)).status_code == httpx.codes.OK
        body = {"model": TINY, "prompt": CANARY, "max_tokens": 2, "user": CANARY, "stop": [CANARY]}
        assert (await client.post(PATHS[1], json=body)).status_code == httpx.codes.OK
        assert (await client.post("/tokenize", json={"model": TINY, "prompt": CANARY})).status_code == httpx.codes.OK


async def _speak_programs(mesh: Mesh) -> None:
    async with Channel.open(mesh.grpc, token=MeshToken(api_key(mesh))) as channel:
        request = ChatRequest(
            model=TINY, messages=(Message(role="user", content=CANARY),), params=CallParams(max_tokens=2)
        )
        async with channel.stream(Inference.CHAT, request, timeout_s=10) as events:
            assert [event async for event in events]
        program = (await channel.call(Programs.OPEN, OpenProgram(), timeout_s=5)).program_id
        value = SetVariable(program_id=program, name="x", value=CANARY)
        await channel.call(Programs.SET, value, timeout_s=5)
        get = GetVariable(program_id=program, name="x", objective=Objective(), timeout_s=1.0)
        assert (await channel.call(Programs.GET, get, timeout_s=5)).value == CANARY


async def _speak_flow(mesh: Mesh) -> None:
    def node(name: str, text: str) -> Node:
        params = CallParams(max_tokens=2, temperature=0.0)
        return Node(id=name, work=LlmNode(messages=(Message(role="user", content=text),), params=params))

    nodes = (node("a", f"{CANARY} {{{{given}}}}"), node("b", f"{CANARY} {{{{a}}}}"))
    submit = SubmitRun(workflow=Workflow(name="w", nodes=nodes), inputs={"given": CANARY})
    too_long = SubmitRun(workflow=Workflow(name="w", nodes=(node("a", CANARY * 300),)))
    async with Channel.open(mesh.flow, token=MeshToken(api_key(mesh))) as channel:
        for request, state in ((submit, "SUCCEEDED"), (too_long, "FAILED")):
            run = (await channel.call(Flow.SUBMIT, request, timeout_s=10)).run_id
            view = await channel.call(Flow.WAIT, WaitRun(run_id=run, timeout_s=30.0), timeout_s=35)
            assert view.state == state, view.error


async def _speak_wrongly(mesh: Mesh) -> None:
    """Errors quote the field, never its content."""
    bodies: tuple[bytes, ...] = (
        json.dumps(chat_body(TINY, CANARY * 400)).encode(),
        json.dumps(chat_body(CANARY, "hello")).encode(),
        json.dumps(chat_body(TINY, CANARY) | {"temperature": 9}).encode(),
        json.dumps(chat_body(TINY, CANARY) | {CANARY: CANARY}).encode(),
        f'{{"model": "{CANARY}'.encode(),
        f'{{"model": "{CANARY}\xff"}}'.encode("latin-1"),
    )
    async with client_of(mesh) as client:
        for body in bodies:
            assert 400 <= (await client.post(PATHS[0], content=body)).status_code < 500
        assert (await client.get(f"/{CANARY}", params={"q": CANARY})).status_code == httpx.codes.NOT_FOUND
        odd = await client.get("/v1/models", headers={"Authorization": f"Bearer {CANARY}{CANARY}"})
        assert odd.status_code == httpx.codes.UNAUTHORIZED
