"""A semcache without its process: the real cache over the real or a bag-of-words encoder."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from random import Random

import anyio
import numpy as np
import structlog
from anyio import to_thread

from covey.actor import Restart, supervise
from covey.clock import Clock
from covey.net.channels import Channels
from covey.net.memory_bus import MemoryBroker, MemoryBus
from covey.policy.reuse import ReuseMode, ReusePolicy
from covey.policy.reuse_model import DecisionModel
from covey.telemetry import Metrics
from covey.types.generate import FinishReason
from covey.types.ids import TenantId, WorkerId
from covey.types.semcache import CacheOffer, CacheQuery
from services.semcache.branch import Branch
from services.semcache.cache import AnswerCache
from services.semcache.config import CategoryConfig, Config
from services.semcache.desk import Desk
from services.semcache.documents import Documents, MemoryDocuments
from services.semcache.encoder import Embedder, Encode, Encoder, EncoderStatus, Phase
from services.semcache.flights import open_flights
from services.semcache.journal import Journals
from services.semcache.learning import learn_categories
from services.semcache.learnt import with_models
from services.semcache.library import Library
from services.semcache.metrics import CacheMetrics
from services.semcache.minilm import Encoded, EncoderModel
from services.semcache.peers import Peers
from services.semcache.segment_files import SegmentFiles
from services.semcache.service import limits_of
from services.semcache.servicer import SemCacheServicer
from services.semcache.storage import open_store, quota_of
from services.semcache.store import Store
from services.semcache.tutor import Tutor
from services.semcache.upkeep import Upkeep

MODEL = "tiny"
ACME, RIVAL = TenantId("acme"), TenantId("rival")
SEMANTIC = Config(categories={"faq": CategoryConfig(mode=ReuseMode.SEMANTIC)})


class BagOfWords:
    """An encoder double: texts with the same words are equal, texts that share none are orthogonal, almost surely."""

    dim = 64
    words_max = 50

    def encode(self, texts: Sequence[str]) -> list[Encoded]:
        return [self._one(text) for text in texts]

    def _one(self, text: str) -> Encoded:
        words = text.lower().split()
        if len(words) > self.words_max:
            return Encoded(vector=None, tokens=len(words))
        total = sum((_direction(word, self.dim) for word in words), start=_direction("", self.dim) * 1e-6)
        return Encoded(vector=(total / np.linalg.norm(total)).astype(np.float32), tokens=len(words))


def _direction(word: str, dim: int) -> np.ndarray:
    seed = int.from_bytes(hashlib.blake2b(word.encode(), digest_size=4).digest())
    return np.random.default_rng(seed).standard_normal(dim)


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """What a test may look into."""

    cache: AnswerCache
    desk: Desk
    branch: Branch
    store: Store
    library: Library
    embedder: Embedder
    servicer: SemCacheServicer
    upkeep: Upkeep
    status: EncoderStatus
    metrics: Metrics


@asynccontextmanager
async def running_cache(
    clock: Clock,
    config: Config = SEMANTIC,
    *,
    load: Callable[[], EncoderModel] = BagOfWords,
    wait: bool = True,
    documents: Documents | None = None,
    files: SegmentFiles | None = None,
    encoder: str = "words",
    rng: Random | None = None,
    models: Mapping[str, DecisionModel] | None = None,
) -> AsyncIterator[Parts]:
    """Own a cache for a block; unless told not to, wait until its encoder is there and its categories are learnt."""
    metrics = await to_thread.run_sync(Metrics)  # it reads /proc
    status, log = EncoderStatus(), structlog.get_logger()
    instruments = CacheMetrics(metrics)
    library = await filled(config, documents or MemoryDocuments(), files, encoder, clock)
    async with Channels.open() as channels, supervise(grace_s=1.0) as supervisor:
        actor = supervisor.start(
            lambda: Encoder(load, status, batch_max=config.encode_batch, clock=clock, log=log),
            name="encoder",
            capacity=config.encoder_queue,
            restart=Restart(),
        )
        if config.preload:
            actor.offer(Encode(texts=()))
        embedder = Embedder(actor, status, memo_max=config.memo_max)
        cache = AnswerCache(
            library,
            ReusePolicy(with_models(config.policies(), models or {}, config.guarded())),
            embedder,
            classifies=bool(config.examples()),
            limits=limits_of(config),
            accounts=config.accounts(),
            metrics=instruments,
            clock=clock,
            rng=rng or Random(7),
        )
        if wait:
            while status.phase is Phase.LOADING:
                await anyio.sleep(0.01)
            await learn_categories(config.examples(), embedder, cache, floor=config.classify_floor, log=log)
        desk = Desk(cache, library, embedder, open_flights(config, clock, Random(8), instruments), instruments, clock)
        branch = lonely(desk, config, channels, clock)
        tutor = Tutor(embedder, config.tutor(), clock=clock, rng=Random(3))
        yield Parts(
            desk=desk,
            branch=branch,
            cache=cache,
            store=library.store,
            library=library,
            embedder=embedder,
            servicer=SemCacheServicer(
                branch, embedder, tutor, model="all-MiniLM-L6-v2", embed_batch=8, embed_wait_s=5.0
            ),
            upkeep=Upkeep(library, embedder, instruments, clock, every_s=config.sweep_s),
            status=status,
            metrics=metrics,
        )


async def filled(
    config: Config, documents: Documents, files: SegmentFiles | None, encoder: str, clock: Clock
) -> Library:
    """A library with what its documents hold."""
    library = Library(
        open_store(config),
        documents,
        encoder=encoder,
        files=files,
        recent_bytes_max=config.recent_bytes_max,
        clock=clock,
        log=structlog.get_logger(),
    )
    policies = {policy.name: policy for policy in config.policies()}
    await library.restore(lambda category: quota_of(policies.get(category)))
    return library


def lonely(desk: Desk, config: Config, channels: Channels, clock: Clock) -> Branch:
    """The place of a semcache that is the only one."""
    return Branch(
        desk,
        Journals(desk.library, clock),
        Peers(lambda: (), WorkerId("semcache-0")),
        channels,
        MemoryBus(MemoryBroker()),
        ttl={policy.name: policy.ttl_s for policy in config.policies()}.get,
        epoch=1,
        clock=clock,
        log=structlog.get_logger(),
    )


def query(
    text: str = "",
    *,
    tenant: TenantId = ACME,
    model: str = MODEL,
    exact: bytes = b"",
    context: bytes = b"system",
    category: str = "faq",
    max_age_s: float = 0.0,
) -> CacheQuery:
    return CacheQuery(
        tenant=tenant,
        model=model,
        exact_key=exact,
        context_key=context,
        text=text,
        category=category,
        max_age_s=max_age_s,
    )


def offer(asked: CacheQuery, answer: str = "an answer", reason: FinishReason = FinishReason.STOP) -> CacheOffer:
    return CacheOffer(query=asked, text=answer, ids=(1, 2, 3), reason=reason, prompt_tokens=9, completion_tokens=3)
