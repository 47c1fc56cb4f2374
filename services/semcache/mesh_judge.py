"""A judge of served hits: a model of the mesh, asked through the gateway, heard by Meta Ranking."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable
from typing import Final

import anyio

from covey.codec.methods import Inference
from covey.errors import DeadlineExceeded
from covey.net.rpc import Channel
from covey.policy.meta_ranking import REFERENCES, Comparison, MetaRanking, Reference
from covey.types.ids import TenantId
from covey.types.program import CacheMode, CallParams, ChatRequest, Delta, Message

from .shadow import Sampled

TENANT_HEADER = "x-covey-tenant"
TENANTS_MAX = 64
KNOWN_MAX: Final = 16
"""Pairs kept of each tenant, to compare with."""
TEXT_CHARS_MAX = 600
TEMPLATE = (
    "Two answers to two different questions. Which answer is more likely to be correct?\n\n"
    "Question 1: {}\nAnswer 1: {}\n\nQuestion 2: {}\nAnswer 2: {}\n\n"
    "Reply with the number of the more reliable answer only."
)
VERDICT_TOKENS = 4
COMPARED = REFERENCES - 1
"""As many reliable as unreliable ones: a fifth would decide where the model says nothing."""

Pair = tuple[str, str]
"""A question and an answer."""


class MeshJudge:
    """Compares a hit with references of the same tenant, in both orders; a few of its pairs are held in memory.

    The references are ours: the paper has labelled ones. An answer beside the question that it was given to is taken to
    be reliable, the same answer beside another hit's question not.
    """

    def __init__(self, gateway: Callable[[], Channel], model: str, *, timeout_s: float) -> None:
        """Ask `model` through what `gateway` returns (or raises), in `timeout_s` for all questions of one hit."""
        self._gateway = gateway
        self._model = model
        self._timeout_s = timeout_s
        self._ranking = MetaRanking()
        self._known: OrderedDict[TenantId, deque[Pair]] = OrderedDict()

    async def judge(self, sampled: Sampled) -> bool | None:
        """Whether the answer fits what was asked. Raises `CoveyError`.

        None without enough to compare with, and where the votes cancel out, as those of a model do that always prefers
        what stands first.
        """
        known = self._pairs_of(sampled.tenant)
        own = (sampled.stored, sampled.answer)
        references = _references([pair for pair in known if pair[1] != sampled.answer])
        if own not in known:
            known.append(own)
        target = (sampled.asked, sampled.answer)
        try:
            with anyio.fail_after(self._timeout_s):
                comparisons = [
                    Comparison(
                        reference=reference,
                        first=await self._better(sampled.tenant, target, pair),
                        second=_turned(await self._better(sampled.tenant, pair, target)),
                    )
                    for reference, pair in references
                ]
        except TimeoutError as error:
            raise DeadlineExceeded(f"{self._model} did not judge in {self._timeout_s:g} s") from error
        judgement = self._ranking.judge(comparisons)
        return judgement.reliable if judgement.score else None

    async def _better(self, tenant: TenantId, one: Pair, other: Pair) -> int | None:
        """1 when the model takes the first for the more reliable, -1 for the second; None when it says neither."""
        texts = [text[:TEXT_CHARS_MAX] for text in (*one, *other)]
        request = ChatRequest(
            model=self._model,
            messages=(Message(role="user", content=TEMPLATE.format(*texts)),),
            params=CallParams(temperature=0.0, max_tokens=VERDICT_TOKENS),
            cache=CacheMode.BYPASS,
        )
        text = ""
        headers = {TENANT_HEADER: tenant}
        async with self._gateway().stream(
            Inference.CHAT, request, timeout_s=self._timeout_s, headers=headers
        ) as events:
            async for event in events:
                text += event.text if isinstance(event, Delta) else ""
        said = next((letter for letter in text if letter in "12"), "")
        return {"1": 1, "2": -1}.get(said)

    def _pairs_of(self, tenant: TenantId) -> deque[Pair]:
        known = self._known.setdefault(tenant, deque(maxlen=KNOWN_MAX))
        self._known.move_to_end(tenant)
        while len(self._known) > TENANTS_MAX:
            self._known.popitem(last=False)
        return known


def _references(pairs: list[Pair]) -> list[tuple[Reference, Pair]]:
    """The last pairs as they are, and between them answers beside the question before theirs: reliable and not."""
    found: list[tuple[Reference, Pair]] = []
    for i in range(len(pairs) - 1, 0, -1):
        found.append((Reference(id=f"{i}", reliable=True), pairs[i]))
        found.append((Reference(id=f"{i}-moved", reliable=False), (pairs[i - 1][0], pairs[i][1])))
    return found[:COMPARED] if len(found) >= COMPARED else []


def _turned(verdict: int | None) -> int | None:
    return None if verdict is None else -verdict
