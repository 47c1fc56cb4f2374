"""semcache itself under a stream: its own cache, tables and index in this process, vectors from the file."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from random import Random

import anyio
import numpy as np
import structlog
from anyio import to_thread

from benchmarks.cache_rules import Outcomes, VectorOf
from benchmarks.cache_sets import Question
from benchmarks.drivers.questions import FALSE, MISS, RIGHT
from covey.actor import Restart, supervise
from covey.clock import Clock, MonotonicClock
from covey.policy.break_even import BreakEvenConfig
from covey.policy.dialogue import spell_out
from covey.policy.evidence import NEIGHBOURS
from covey.policy.reuse import GENERAL, CategoryPolicy, ReuseMode, ReusePolicy
from covey.policy.reuse_learning import Labelled, Learnt, learn_decision
from covey.telemetry import Metrics
from covey.types.generate import FinishReason
from covey.types.ids import TenantId
from covey.types.semcache import CacheOffer, CacheQuery
from services.semcache.accounts import AccountsConfig
from services.semcache.cache import AnswerCache
from services.semcache.config import Config
from services.semcache.documents import MemoryDocuments
from services.semcache.encoder import Embedder, Encoder, EncoderStatus
from services.semcache.finder import CacheLimits
from services.semcache.library import Library
from services.semcache.metrics import CacheMetrics
from services.semcache.minilm import Encoded
from services.semcache.rewrite import history_key
from services.semcache.storage import open_store
from services.semcache.upkeep import Upkeep

TENANT, MODEL = TenantId("bench"), "model"
TIMEOUT_S = 30.0
ENTRIES_MAX = 1_000_000
ALWAYS_S = 1e9
UNACCOUNTED = AccountsConfig(break_even=BreakEvenConfig(lookups_min=1 << 60))
"""No model computes here, so no look-up would seem worth its while."""


@dataclass(slots=True)
class Played:
    """What came of each question, and how long the look-ups took (encoding apart).

    `memory_bytes` is what our quotas account for all entries, documents and vectors included; of a peer, what its
    process (and its server) grew by.
    """

    outcomes: Outcomes
    lookup_s: list[float] = field(default_factory=list)
    insert_s: list[float] = field(default_factory=list)
    categories: list[str] = field(default_factory=list)
    stale: int = 0
    memory_bytes: int = 0


class KnownVectors:
    """An encoder that looks its vectors up."""

    def __init__(self, vector_of: VectorOf, dim: int) -> None:
        self._vector_of = vector_of
        self.dim = dim

    def encode(self, texts: Sequence[str]) -> list[Encoded]:
        return [Encoded(vector=self._vector_of(text), tokens=len(text.split())) for text in texts]


def keys_of(questions: Sequence[Question]) -> list[str]:
    """The texts that semcache encodes for these questions."""
    return [spell_out(question.text, question.turns).text for question in questions]


def learn(questions: Sequence[Question], vector_of: VectorOf) -> Learnt:
    """Learn a category's decision from its labelled half, keyed as semcache keys it."""
    labelled = []
    for question in questions:
        found = spell_out(question.text, question.turns)
        query = CacheQuery(tenant=TENANT, model=MODEL, turns=question.turns)
        shelf = 0 if found.resolved else int.from_bytes(history_key(query)[:7])
        labelled.append(Labelled(text=found.text, answer=question.answer, vector=vector_of(found.text), shelf=shelf))
    return learn_decision(labelled)


def policies(learnt: Mapping[str, Learnt], ttl_s: float = ALWAYS_S) -> list[CategoryPolicy]:
    """A category for each set: semantic with what was learnt, exact where that is nothing."""
    found = [
        CategoryPolicy(
            name=name,
            mode=ReuseMode.SEMANTIC if one.model is not None else ReuseMode.EXACT,
            model=one.model,
            guard=False,
            ttl_s=ttl_s,
            quota_entries=ENTRIES_MAX,
        )
        for name, one in learnt.items()
    ]
    return [CategoryPolicy(name=GENERAL), *found]


async def play(
    category: str,
    questions: Sequence[Question],
    categories: Sequence[CategoryPolicy],
    vector_of: VectorOf,
    *,
    dim: int,
    clock: Clock | None = None,
    versions: Sequence[int] = (),
    examples: Mapping[str, Sequence[str]] | None = None,
) -> Played:
    """Ask every question of an empty cache and offer the right answer to each that it does not serve.

    With `examples` no question names its category: it is classified. `versions` number the right answer's changes as of
    each question: an answer of an earlier version is stale.
    """
    clock = clock or MonotonicClock()
    log, status = structlog.get_logger(), EncoderStatus()
    metrics = CacheMetrics(await to_thread.run_sync(Metrics))  # it reads /proc
    config = Config(entries_max=ENTRIES_MAX, size_bytes_max=1 << 34)
    library = Library(
        open_store(config), MemoryDocuments(), encoder="bench", recent_bytes_max=1 << 33, clock=clock, log=log
    )
    played = Played(outcomes=np.full(len(questions), MISS, dtype=np.int8))
    async with supervise(grace_s=1.0) as supervisor:
        actor = supervisor.start(
            lambda: Encoder(lambda: KnownVectors(vector_of, dim), status, batch_max=8, clock=MonotonicClock(), log=log),
            name="encoder",
            capacity=64,
            restart=Restart(),
        )
        embedder = Embedder(actor, status, memo_max=4096)
        await embedder.many((questions[0].text,), timeout_s=TIMEOUT_S)
        cache = AnswerCache(
            library,
            ReusePolicy(categories),
            embedder,
            classifies=examples is not None,
            limits=CacheLimits(neighbours=NEIGHBOURS, encode_s=TIMEOUT_S),
            metrics=metrics,
            clock=clock,
            rng=Random(0),  # noqa: S311 - reproducible
            accounts=UNACCOUNTED,
        )
        if examples is not None:
            found = {name: [vector_of(text) for text in texts] for name, texts in examples.items()}
            known = {name: [vector for vector in vectors if vector is not None] for name, vectors in found.items()}
            cache.learn(known, floor=0.0)  # nothing foreign is asked here
        upkeep = Upkeep(library, embedder, metrics, MonotonicClock(), every_s=config.sweep_s)
        async with anyio.create_task_group() as tg:
            tg.start_soon(upkeep.run)
            for index, question in enumerate(questions):
                version = versions[index] if versions else 0
                await _ask(cache, embedder, "" if examples is not None else category, question, index, version, played)
                if versions:
                    await _advance(clock)
            played.memory_bytes = library.store.size_bytes
            tg.cancel_scope.cancel()
    return played


async def _advance(clock: Clock) -> None:
    advance = getattr(clock, "advance", None)
    if advance is not None:
        advance(1.0)
    await anyio.lowlevel.checkpoint()


async def _ask(
    cache: AnswerCache, embedder: Embedder, category: str, question: Question, index: int, version: int, played: Played
) -> None:
    context = b"system"
    key = blake2b(json.dumps([question.turns, question.text]).encode(), digest_size=16).digest()
    query = CacheQuery(
        tenant=TENANT,
        model=MODEL,
        exact_key=key,
        context_key=context,
        text=question.text,
        category=category,
        turns=question.turns[-16:],
    )
    await embedder.one(TENANT, keys_of([question])[0], timeout_s=TIMEOUT_S)  # the memo has it: encoding is not timed
    timer = MonotonicClock()
    began = timer.now()
    reply = await cache.lookup(query, timeout_s=TIMEOUT_S)
    played.lookup_s.append(timer.now() - began)
    played.categories.append(reply.category)
    if reply.answer is not None:
        answer, stored_version = json.loads(reply.answer.text)
        is_right = answer == question.answer
        is_stale = is_right and stored_version != version
        played.stale += is_stale
        played.outcomes[index] = (RIGHT if is_right else FALSE) if not is_stale else MISS
        return
    began = timer.now()
    text = json.dumps([question.answer, version])
    await cache.offer(CacheOffer(query=query, text=text, reason=FinishReason.STOP), timeout_s=TIMEOUT_S)
    played.insert_s.append(timer.now() - began)
