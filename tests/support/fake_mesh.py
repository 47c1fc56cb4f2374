"""An in-process mesh for gateway tests: fake engines with a deterministic model, a fake semcache, a directory."""

from __future__ import annotations

import io
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field, replace
from random import Random
from typing import Any

import anyio
from anyio.abc import TaskGroup, TaskStatus
from prometheus_client import CollectorRegistry

from covey.auth import ApiKeys
from covey.clock import MonotonicClock
from covey.codec.methods import Decode, Prefill, SemCache
from covey.errors import CoveyError, InvalidArgument, Unavailable
from covey.net.memory import MemoryNetwork
from covey.net.rpc import Call, Handlers
from covey.net.tasks import background_tasks
from covey.telemetry import new_log
from covey.types.event import WorkerRecord, WorkerState
from covey.types.generate import (
    Accepted,
    EngineInfo,
    EngineLoad,
    Event,
    Failed,
    Finished,
    FinishReason,
    GenerateRequest,
    Handover,
    HandoverTicket,
    Progress,
    Refused,
    RetainReply,
    RetainRequest,
    Role,
    Stage,
    Timings,
    TokenLogprob,
    Tokens,
    TopLogprob,
    Usage,
)
from covey.types.ids import LeaseId, TenantId, WorkerId
from covey.types.program import CacheOutcome, EmbedReply, EmbedRequest, Vector
from covey.types.semcache import CachedAnswer, CacheOffer, CacheQuery, CacheReply, OfferReply
from services.gateway.assembly import Gateway, Surroundings, assembled
from services.gateway.config import Config, DispatchSettings, RoutingSettings
from services.gateway.models import LocalModel, Model

MODEL = "fake"
API_KEY = "ck-a-test-key-of-some-length"
OTHER_KEY = "ck-the-key-of-another-tenant"
TENANT, OTHER = TenantId("acme"), TenantId("other")
CONTEXT = 2048
BLOCK = 16


class FakeTokenizer:
    """A token is a byte."""

    context_limit = CONTEXT
    hash = "fake-tokenizer"
    vocab_size = 256
    chat_template = ""
    supports_tools = False

    def encode(self, text: str, *, add_special: bool = True) -> list[int]:
        return list(text.encode())

    def encode_chat(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] | None = None
    ) -> list[int]:
        return self.encode("".join(f"<{m['role']}>{m['content']}" for m in messages))

    def decode(self, tokens: Sequence[int], *, skip_special: bool = True) -> str:
        return bytes(tokens).decode("utf-8", "replace")


def expected_ids(request: GenerateRequest | tuple[int, ...], count: int, seed: int = 0) -> tuple[int, ...]:
    """What the fake model generates: letters that depend on prompt, seed (when sampled) and position."""
    prompt = request.token_ids if isinstance(request, GenerateRequest) else request
    return tuple(97 + (sum(prompt) * 31 + seed * 17 + i * (7 + sum(prompt) % 5)) % 26 for i in range(count))


@dataclass
class FakeWorker:
    """An engine whose faults a test chooses. `seen` are the requests it got, `cancelled` counts abandoned ones."""

    name: str
    role: Role
    answer_tokens: int = 12
    script: str = ""
    """What it answers, a byte a token, instead of letters."""
    pace_s: float = 0.0
    refuse: int = 0
    die_after: int | None = None
    silent_after: int | None = None
    frozen_at: int | None = None
    frozen_s: float = 0.0
    fail: Failed | None = None
    skip_at: int | None = None
    stale_first: bool = False
    retry_after_ms: int = 10
    tokenizer_hash: str = FakeTokenizer.hash
    load: EngineLoad = field(default_factory=EngineLoad)
    seen: list[GenerateRequest] = field(default_factory=list)
    headers: list[Mapping[str, str]] = field(default_factory=list)
    retained: list[RetainRequest] = field(default_factory=list)
    cancelled: int = 0
    running: int = 0
    gate: anyio.Event | None = None
    epoch: int = 1

    def info(self) -> EngineInfo:
        return EngineInfo(
            worker=WorkerId(self.name),
            role=self.role,
            model=MODEL,
            revision="r1",
            tokenizer_hash=self.tokenizer_hash,
            block_size=BLOCK,
            block_bytes=1,
            layers=1,
            capacity_blocks=100,
            context_limit=CONTEXT,
            layout_fingerprint="x",
            precision="fp32",
            kv_dtype="fp32",
        )

    def handlers(self) -> Handlers:
        if self.role is Role.PREFILL:
            return {Prefill.GENERATE: self.generate}
        return {Decode.GENERATE: self.generate, Decode.RETAIN: self.retain}

    async def retain(self, request: RetainRequest, _call: Call) -> RetainReply:
        self.retained.append(request)
        return RetainReply(blocks=1, size_bytes=1, ttl_s=request.ttl_s)

    async def generate(self, request: GenerateRequest, call: Call) -> AsyncIterator[Event]:
        self.seen.append(request)
        self.headers.append(call.headers)
        self.running += 1
        ended = False
        try:
            if self.refuse > 0:
                self.refuse -= 1
                yield Refused(code="OVERLOADED", message="no room", retry_after_ms=self.retry_after_ms)
                ended = True
                return
            async for event in self._answer(request):
                ended = isinstance(event, Finished | Failed | Handover)
                yield event
        finally:
            self.running -= 1
            self.cancelled += not ended

    async def _answer(self, request: GenerateRequest) -> AsyncIterator[Event]:
        yield Accepted(worker=WorkerId(self.name))
        yield Progress(stage=Stage.PREFILL)
        if self.gate is not None:
            await self.gate.wait()
        if self.fail is not None:
            yield self.fail
            return
        seed = request.sampling.seed if request.sampling.temperature else 0
        wanted = len(self.script.encode()) or self.answer_tokens
        count = min(wanted, request.sampling.max_tokens)
        ids = tuple(self.script.encode())[:count] or expected_ids(request, count, seed)
        start = len(request.ticket.emitted) if request.ticket else 0
        start = len(request.resume.emitted) if request.resume else start
        if self.role is Role.PREFILL and count > 1:
            await self._pace(0)
            yield self._handover(request, ids)
            return
        if self.stale_first:
            yield replace(self._tokens(request, ids, start), attempt=request.attempt + 7)
        for offset in range(start, count):
            await self._pace(offset)
            if offset == self.skip_at:
                continue
            yield self._tokens(request, ids, offset)
        usage = Usage(prompt_tokens=len(request.token_ids), completion_tokens=count, cached_tokens=0)
        reason = FinishReason.STOP if count == wanted else FinishReason.LENGTH
        yield Finished(reason=reason, usage=usage, timings=Timings(decode_s=0.5), lease=LeaseId(f"l-{self.name}"))

    async def _pace(self, offset: int) -> None:
        if self.die_after is not None and offset >= self.die_after:
            raise Unavailable("killed")
        if self.silent_after is not None and offset >= self.silent_after:
            await anyio.sleep_forever()
        await anyio.sleep(self.frozen_s if offset == self.frozen_at else self.pace_s)

    def _tokens(self, request: GenerateRequest, ids: tuple[int, ...], offset: int) -> Tokens:
        token = ids[offset]
        logprobs: tuple[TokenLogprob, ...] = ()
        if request.sampling.logprobs is not None:
            rival = TopLogprob(id=63, token=b"?", logprob=-2.0)
            logprobs = (TokenLogprob(id=token, token=bytes([token]), logprob=-0.5, top=(rival,)),)
        return Tokens(
            attempt=request.attempt, offset=offset, ids=(token,), text=chr(token), text_offset=offset, logprobs=logprobs
        )

    def _handover(self, request: GenerateRequest, ids: tuple[int, ...]) -> Handover:
        ticket = HandoverTicket(
            request_id=request.request_id,
            attempt=request.attempt,
            source=WorkerId(self.name),
            scopes=request.scopes,
            hashes=(),
            covered=len(request.token_ids),
            emitted=ids[:1],
            text_offset=1,
        )
        usage = Usage(prompt_tokens=len(request.token_ids), loaded_tokens=3, blocks_moved=2)
        timings = Timings(prefill_s=0.25, lookup_s=0.125)
        return Handover(ticket=ticket, first=self._tokens(request, ids, 0), usage=usage, timings=timings)


@dataclass
class FakeSemCache:
    """Answers what a test planted; keeps what it is offered."""

    exact: dict[bytes, CachedAnswer] = field(default_factory=dict)
    semantic: CachedAnswer | None = None
    delay_s: float = 0.0
    error: CoveyError | None = None
    queries: list[CacheQuery] = field(default_factory=list)
    offers: list[CacheOffer] = field(default_factory=list)

    def handlers(self) -> Handlers:
        return {SemCache.LOOKUP: self.lookup, SemCache.OFFER: self.offer, SemCache.EMBED: self.embed}

    async def lookup(self, query: CacheQuery, _call: Call) -> CacheReply:
        self.queries.append(query)
        await anyio.sleep(self.delay_s)
        if self.error is not None:
            raise self.error
        if not query.model:
            raise InvalidArgument("a query needs its model", field="model")
        if query.exact_key and query.exact_key in self.exact:
            return CacheReply(outcome=CacheOutcome.EXACT, answer=self.exact[query.exact_key])
        if query.text and self.semantic is not None:
            return CacheReply(outcome=CacheOutcome.SEMANTIC, answer=self.semantic)
        return CacheReply(outcome=CacheOutcome.MISS)

    async def offer(self, offer: CacheOffer, _call: Call) -> OfferReply:
        self.offers.append(offer)
        self.exact[offer.query.exact_key] = CachedAnswer(
            entry="e",
            text=offer.text,
            ids=offer.ids,
            reason=offer.reason,
            prompt_tokens=offer.prompt_tokens,
            completion_tokens=offer.completion_tokens,
        )
        return OfferReply(stored=True)

    async def embed(self, request: EmbedRequest, _call: Call) -> EmbedReply:
        vectors = tuple(Vector(values=(float(len(text)), 0.5)) for text in request.inputs)
        return EmbedReply(vectors=vectors, prompt_tokens=sum(map(len, request.inputs)))


@dataclass(frozen=True)
class View:
    record: WorkerRecord
    load: EngineLoad
    age_s: float = 0.0


class FakeDirectory:
    """The registry's part: who is there."""

    def __init__(self) -> None:
        self.records: dict[str, WorkerRecord] = {}
        self.engines: dict[str, FakeWorker] = {}

    def workers(self, role: Role) -> Sequence[View]:
        return [
            View(record=r, load=self.engines[n].load if n in self.engines else EngineLoad())
            for n, r in self.records.items()
            if r.role is role
        ]


class FakeMesh:
    """Workers on a `MemoryNetwork` and one assembled gateway before them."""

    def __init__(self, network: MemoryNetwork, stack: AsyncExitStack, tg: TaskGroup) -> None:
        self.network = network
        self._tg = tg
        self.directory = FakeDirectory()
        self.metrics = CollectorRegistry()
        self.logged = io.StringIO()
        self._stack = stack

    async def add(self, worker: FakeWorker) -> FakeWorker:
        address = await self._tg.start(self._host, worker.handlers())
        record = WorkerRecord(
            worker=WorkerId(worker.name),
            role=worker.role,
            address=address,
            epoch=worker.epoch,
            state=WorkerState.READY,
            engine=worker.info(),
        )
        self.directory.records[worker.name] = record
        self.directory.engines[worker.name] = worker
        return worker

    async def add_semcache(self, cache: FakeSemCache) -> FakeSemCache:
        address = await self._tg.start(self._host, cache.handlers())
        self.directory.records["semcache"] = WorkerRecord(
            worker=WorkerId("semcache"),
            role=Role.SEMCACHE,
            address=address,
            epoch=1,
            state=WorkerState.READY,
            labels={"embedding_model": "tiny-embedder"},
        )
        return cache

    async def _host(self, handlers: Handlers, *, task_status: TaskStatus[str]) -> None:
        async with self.network.serve("127.0.0.1:0", handlers, grace_s=0.0) as server:
            task_status.started(server.address)
            await anyio.sleep_forever()

    def kill(self, worker: FakeWorker) -> None:
        """As SIGKILL does: streams end, new calls fail; the registry has not noticed yet."""
        self.network.disconnect(self.directory.records[worker.name].address)

    def metric(self, name: str, **labels: str) -> float:
        return self.metrics.get_sample_value(name, labels) or 0.0

    async def gateway(self, config: Config | None = None, models: Sequence[Model] = ()) -> Gateway:
        channels = await self._stack.enter_async_context(self.network.channels())
        around = Surroundings(
            channels=channels,
            directory=self.directory,
            index=None,
            clock=MonotonicClock(),
            rng=Random(1),
            registry=self.metrics,
            mesh_secret=b"a secret of the test mesh",
            keys=ApiKeys({TENANT: API_KEY, OTHER: OTHER_KEY}),
            models=models or (LocalModel(name=MODEL, tokenizer=FakeTokenizer()),),
            remote_keys={},
            log=new_log("gateway", stream=self.logged),
        )
        return await self._stack.enter_async_context(assembled(config or fast(), around))


@asynccontextmanager
async def fake_mesh() -> AsyncIterator[FakeMesh]:
    async with background_tasks() as tg, AsyncExitStack() as stack:
        yield FakeMesh(MemoryNetwork(), stack, tg)


def fast(split: str = "never", **changes: Any) -> Config:
    """A configuration whose waits suit tests."""
    dispatch = DispatchSettings(event_gap_s=0.3, queue_wait_s=2.0, deadline_s=20.0, semantic_deadline_s=0.2)
    config = Config(dispatch=dispatch, routing=RoutingSettings(split=split))  # type: ignore[arg-type]
    return Config(**{**{f: getattr(config, f) for f in config.__struct_fields__}, **changes})
