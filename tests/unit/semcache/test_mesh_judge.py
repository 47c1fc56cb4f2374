"""A model of the mesh as judge: what it is asked, whose texts it sees, and what happens when it is late or odd."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

import anyio
import pytest

from covey.codec.methods import Inference
from covey.errors import CoveyError, DeadlineExceeded, Unavailable
from covey.net.memory import MemoryNetwork
from covey.net.rpc import Call, Handlers
from covey.types.ids import TenantId
from covey.types.program import CacheMode, ChatRequest, CompletionEvent, Delta
from services.semcache.mesh_judge import TENANT_HEADER, MeshJudge
from services.semcache.shadow import Sampled

ACME, RIVAL = TenantId("acme"), TenantId("rival")
PAIRS = re.compile(r"Question (\d): (.*)\nAnswer \1: (.*)\n")


@dataclass
class Gateway:
    """A model that knows: an answer is right beside a question of its own topic. `says` overrules it."""

    says: str = ""
    delay_s: float = 0.0
    seen: list[tuple[str, ChatRequest]] = field(default_factory=list)

    def handlers(self) -> Handlers:
        return {Inference.CHAT: self.chat}

    async def chat(self, request: ChatRequest, call: Call) -> AsyncIterator[CompletionEvent]:
        self.seen.append((call.headers.get(TENANT_HEADER, ""), request))
        await anyio.sleep(self.delay_s)
        right = [q.split()[0] == a.split()[0] for _, q, a in PAIRS.findall(request.messages[0].content)]
        verdict = "2" if right[1] and not right[0] else "1"
        yield Delta(index=0, text=self.says or verdict)


def hit(topic: str, asked: str = "", tenant: TenantId = ACME) -> Sampled:
    asked = asked or f"{topic} once more"
    return Sampled(
        category="faq", entry=topic, asked=asked, stored=f"{topic} please", answer=f"{topic} it is", tenant=tenant
    )


async def _judged(gateway: Gateway, *hits: Sampled, timeout_s: float = 5.0) -> list[bool | CoveyError | None]:
    network = MemoryNetwork()
    async with network.serve("127.0.0.1:0", gateway.handlers(), grace_s=0.0) as server, network.channels() as channels:
        judge = MeshJudge(lambda: channels.to(server.address), "small", timeout_s=timeout_s)
        return [await _verdict(judge, one) for one in hits]


async def _verdict(judge: MeshJudge, one: Sampled) -> bool | CoveyError | None:
    try:
        return await judge.judge(one)
    except CoveyError as error:
        return error


KNOWN = tuple(hit(topic) for topic in ("ports", "files", "users", "disks"))


async def test_a_good_answer_is_told_from_one_to_another_question() -> None:
    gateway = Gateway()
    *first, good, bad = await _judged(gateway, *KNOWN, hit("mails"), hit("hosts", asked="songs of whales"))
    assert first[0] is None, "nothing to compare with yet"
    assert not gateway.seen[0][1].params.temperature
    assert {request.cache for _, request in gateway.seen} == {CacheMode.BYPASS}
    assert (good, bad) == (True, False)


async def test_a_judge_that_always_prefers_the_first_says_nothing_and_one_that_babbles_neither() -> None:
    assert (await _judged(Gateway(says="maybe"), *KNOWN, hit("mails")))[-1] is None
    assert (await _judged(Gateway(says="1"), *KNOWN, hit("mails")))[-1] is None, "what stands first decides nothing"


async def test_no_tenant_is_compared_with_another_ones_texts() -> None:
    gateway = Gateway()
    alone = await _judged(gateway, *KNOWN, hit("secret", tenant=RIVAL), hit("mails"))
    assert alone[-2] is None
    assert alone[-1], "positive control: its own tenant has enough to compare with"
    assert {tenant for tenant, _ in gateway.seen} == {ACME}
    assert not [request for _, request in gateway.seen if "secret" in request.messages[0].content]


async def test_a_late_judge_and_one_that_is_gone_cost_a_verdict_only() -> None:
    late = await _judged(Gateway(delay_s=5.0), *KNOWN, timeout_s=0.05)
    assert isinstance(late[-1], DeadlineExceeded)

    def gone() -> None:
        raise Unavailable("no gateway is in the registry")

    judge = MeshJudge(gone, "small", timeout_s=1.0)  # type: ignore[arg-type] # it never returns
    for one in KNOWN[:3]:
        assert await judge.judge(one) is None
    with pytest.raises(Unavailable):
        await judge.judge(KNOWN[3])
