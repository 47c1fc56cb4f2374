"""Engines take any well-formed request that the wire can carry: they run it or refuse it, and go on."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import anyio.from_thread
import pytest
from anyio.from_thread import BlockingPortal
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from covey.auth import MeshToken
from covey.cli.mesh import Mesh
from covey.codec.methods import Decode, Prefill
from covey.errors import CoveyError, Internal, Unavailable
from covey.net.rpc import Channels
from covey.types.common import Empty
from covey.types.generate import (
    Event,
    Failed,
    Finished,
    GenerateRequest,
    Handover,
    HandoverTicket,
    KvScope,
    Resume,
    Sampling,
    TailBlock,
)
from covey.types.ids import BlockHash, NamespaceId, RequestId, TenantId, WorkerId
from tests.support.meshes import TINY

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(180), pytest.mark.xdist_group("security-mesh")]

CALL_S = 10.0
OUR_FAULT = {"INTERNAL", "UNAVAILABLE"}
METHODS = {"prefill-0": Prefill.GENERATE, "decode-0": Decode.GENERATE}
IDS = st.sampled_from((0, 1, 65, 258, 259, 99_999, -1, 2**31 - 1, -(2**31)))
TOKENS = st.lists(st.integers(0, 258), min_size=1, max_size=70).map(tuple) | st.lists(IDS, max_size=4).map(tuple)
NUMBER = st.sampled_from((0.0, 1.0, 0.5, 1e-9, 2.0, -2.0, 1e30, -1e30)) | st.floats()
SAMPLING = st.builds(
    Sampling,
    max_tokens=st.integers(1, 4) | st.just(1_048_576),
    seed=st.sampled_from((0, 1, 2**63 - 1)),
    temperature=st.sampled_from((0.0, 1e-30, 1.0, 100.0)),
    top_p=st.sampled_from((0.0, 1e-30, 0.5, 1.0)),
    top_k=st.sampled_from((0, 1, 2**31 - 1)),
    min_p=st.sampled_from((0.0, 1.0)),
    presence_penalty=st.sampled_from((0.0, 2.0)),
    repetition_penalty=st.sampled_from((0.01, 1.0, 100.0)),
    logit_bias=st.dictionaries(IDS, NUMBER, max_size=3),
    logprobs=st.none() | st.sampled_from((0, 20)),
    min_tokens=st.sampled_from((0, 3, 2**31 - 1)),
    ignore_eos=st.booleans(),
)
SCOPES = st.lists(
    st.builds(
        KvScope,
        namespace=st.binary(max_size=32).map(NamespaceId),
        chain_root=st.binary(max_size=64),
        blocks=st.sampled_from((0, 1, 2**31 - 1)),
    ),
    max_size=4,
).map(tuple)
HASH = st.binary(max_size=32).map(BlockHash)
TICKETS = st.builds(
    HandoverTicket,
    request_id=st.just(RequestId("other")),
    attempt=st.integers(0, 3),
    source=st.just(WorkerId("nobody")),
    scopes=SCOPES,
    hashes=st.lists(HASH, max_size=3).map(tuple),
    tail=st.none() | st.builds(TailBlock, key=HASH, length=st.sampled_from((1, 31, 2**31 - 1))),
    covered=st.sampled_from((0, 1, 32, 64, 2**31 - 1)),
    emitted=st.lists(IDS, max_size=2).map(tuple),
    text_offset=st.sampled_from((0, 7)),
)
REQUESTS = st.builds(
    GenerateRequest,
    request_id=st.text(max_size=20).map(RequestId),
    attempt=st.sampled_from((0, 1, 2**31 - 1)),
    tenant=st.sampled_from(("", "local", "\x00", "é")).map(TenantId),
    model=st.sampled_from((TINY, TINY, TINY, "")),
    scopes=SCOPES,
    token_ids=TOKENS,
    sampling=SAMPLING,
    stop=st.lists(st.text(max_size=3), max_size=3).map(tuple),
    deadline_s=st.sampled_from((0.0, 0.05, 5.0)),
    priority=st.sampled_from((0, -(2**31), 2**31 - 1)),
    resume=st.none() | st.builds(Resume, emitted=st.lists(IDS, max_size=3).map(tuple), text_offset=st.just(5)),
    ticket=st.none() | TICKETS,
)


class Worker:
    """Streams requests at the engines of a mesh."""

    def __init__(self, mesh: Mesh, channels: Channels) -> None:
        self._mesh = mesh
        self._channels = channels

    async def answer(self, name: str, request: GenerateRequest) -> Event | CoveyError:
        """How the request ended; a long answer is cut off after some events."""
        channel = self._channels.to(self._mesh.children[name].addresses["grpc"])
        last: Event | None = None
        try:
            async with channel.stream(METHODS[name], request, timeout_s=CALL_S) as events:
                count = 0
                async for event in events:
                    last, count = event, count + 1
                    if count > 12:
                        break
        except CoveyError as error:
            return error
        assert last is not None, "a stream without an event"
        return last

    async def loads(self) -> tuple[Any, Any]:
        """Both engines answer."""
        decode, prefill = (
            self._channels.to(self._mesh.children[n].addresses["grpc"]) for n in ("decode-0", "prefill-0")
        )
        return (
            await decode.call(Decode.LOAD, Empty(), timeout_s=CALL_S),
            await prefill.call(Prefill.LOAD, Empty(), timeout_s=CALL_S),
        )


@pytest.fixture(scope="module")
def worker(mesh: Mesh) -> Iterator[tuple[BlockingPortal, Worker]]:
    token = MeshToken((mesh.plan.files.run_dir / "mesh.token").read_text())
    with (
        anyio.from_thread.start_blocking_portal() as portal,
        portal.wrap_async_context_manager(Channels.open(token=token)) as channels,
    ):
        yield portal, Worker(mesh, channels)


@settings(
    max_examples=300,
    derandomize=True,
    database=None,
    phases=(Phase.explicit, Phase.generate),  # a worker that died cannot shrink an example
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(name=st.sampled_from(sorted(METHODS)), request=REQUESTS)
def test_an_engine_ends_any_request_well(
    mesh: Mesh, worker: tuple[BlockingPortal, Worker], name: str, request: GenerateRequest
) -> None:
    portal, at = worker
    end = portal.call(at.answer, name, request)
    child = mesh.children[name]
    is_bad = isinstance(end, Internal | Unavailable) or (isinstance(end, Failed) and end.code in OUR_FAULT)
    assert not is_bad, f"{end}\n{child.tail()}"
    assert child.running


def test_the_engines_still_answer_rightly(mesh: Mesh, worker: tuple[BlockingPortal, Worker]) -> None:
    portal, at = worker
    scope = KvScope(namespace=NamespaceId(b"n" * 16), chain_root=b"root")
    request = GenerateRequest(
        request_id=RequestId("good"),
        tenant=TenantId("t"),
        model=TINY,
        scopes=(scope,),
        token_ids=tuple(range(40)),
        sampling=Sampling(max_tokens=3, ignore_eos=True),
        deadline_s=5.0,
    )
    assert isinstance(portal.call(at.answer, "prefill-0", request), Handover)
    assert isinstance(portal.call(at.answer, "decode-0", replace(request, request_id=RequestId("good-2"))), Finished)
