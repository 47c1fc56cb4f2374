"""The workers as this gateway sees them: who can take a request, how loaded, how trusted, and what they hold."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

from covey.auth import chain_root
from covey.clock import Clock
from covey.policy.identity import Namespace, chain
from covey.policy.kv_cost import Took
from covey.policy.routing import Candidate, PrefixMemory, Router
from covey.retry import Breaker
from covey.types.event import WorkerRecord, WorkerState
from covey.types.generate import EngineInfo, EngineLoad, KvScope, Role, Timings, Usage
from covey.types.ids import BlockHash, NamespaceId, TenantId, WorkerId

SUSPECT_S = 2.0
"""How long a worker that was lost is avoided."""

NOBODY = WorkerId("")
EMBEDDING_LABEL = "embedding_model"
"""The registry label under which semcache names its encoder."""

Incarnation = tuple[WorkerId, int]
"""A worker and its epoch: a restarted worker is another one."""


class WorkerView(Protocol):
    """What the registry knows of a worker: its entry, its last load report, and how old that is."""

    @property
    def record(self) -> WorkerRecord: ...
    @property
    def load(self) -> EngineLoad | None: ...
    @property
    def age_s(self) -> float: ...


class Directory(Protocol):
    """Who is there; `covey.net.registry.Registry` is one."""

    def workers(self, role: Role) -> Sequence[WorkerView]: ...


class PrefixIndex(Protocol):
    """How many leading blocks of a chain each worker or store holds; `covey.net.kv_events.KvEventIndex` is one."""

    def overlap(self, namespace: NamespaceId, hashes: Sequence[BlockHash]) -> Mapping[WorkerId, int]: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """A worker that was chosen."""

    worker: WorkerId
    role: Role
    address: str
    epoch: int
    info: EngineInfo

    @property
    def incarnation(self) -> Incarnation:
        return self.worker, self.epoch


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """Where a request goes: `prefill` first, when it is split."""

    decode: Target
    prefill: Target | None = None


class Fleet:
    """Chooses workers by policy from the registry's view, corrected by what this gateway itself has in flight."""

    def __init__(
        self, directory: Directory, index: PrefixIndex | None, router: Router, clock: Clock, mesh_secret: bytes
    ) -> None:
        self._directory = directory
        self._index = index
        self._router = router
        self._clock = clock
        self._secret = mesh_secret
        self._memory = PrefixMemory()
        self._in_flight: Counter[WorkerId] = Counter()
        self._breakers: dict[WorkerId, Breaker] = {}

    def engines(self, model: str, role: Role, tokenizer_hash: str = "") -> list[tuple[WorkerView, EngineInfo]]:
        """Ready workers that serve `model` with the tokenizer of `tokenizer_hash` (empty: any)."""
        return [
            (view, view.record.engine)
            for view in self._directory.workers(role)
            if view.record.state is WorkerState.READY
            and view.record.engine is not None
            and view.record.engine.model == model
            and tokenizer_hash in ("", view.record.engine.tokenizer_hash)
            and not (view.load is not None and view.load.draining)
        ]

    def revision(self, model: str) -> str:
        """Which weights answer for `model`; empty when no worker does."""
        return min((info.revision for _, info in self.engines(model, Role.DECODE)), default="")

    def service(self, role: Role) -> str | None:
        """The address of a service that is no engine, for example semcache; None when there is none."""
        ready = [v for v in self._directory.workers(role) if v.record.state is WorkerState.READY]
        return min(ready, key=lambda v: (v.age_s, v.record.worker)).record.address if ready else None

    def embedders(self) -> dict[str, str]:
        """Embedding models that semcache offers, and where."""
        ready = [v.record for v in self._directory.workers(Role.SEMCACHE) if v.record.state is WorkerState.READY]
        return {r.labels[EMBEDDING_LABEL]: r.address for r in ready if EMBEDDING_LABEL in r.labels}

    def scope(self, info: EngineInfo, tenant: TenantId) -> KvScope:
        """Where this tenant's blocks of this engine live."""
        return KvScope(namespace=_namespace(info, tenant), chain_root=chain_root(self._secret, tenant))

    def place(
        self,
        *,
        model: str,
        tokenizer_hash: str,
        tenant: TenantId,
        token_ids: Sequence[int],
        avoid: Collection[Incarnation] = (),
        sticky: WorkerId = NOBODY,
        decode_only: bool = False,
    ) -> Placement | None:
        """Choose workers for a prompt; None when no decode worker can take it now."""
        decode = self._able(model, Role.DECODE, tokenizer_hash, avoid)
        prefill = [] if decode_only else self._able(model, Role.PREFILL, tokenizer_hash, avoid)
        if not decode:
            return None
        overlaps = self._overlaps({info for _, info in (*decode, *prefill)}, tenant, token_ids)
        route = self._router.choose(
            prefill=[self._candidate(v, i, overlaps, NOBODY) for v, i in prefill],
            decode=[self._candidate(v, i, overlaps, sticky) for v, i in decode],
            prompt_tokens=len(token_ids),
        )
        if route is None:
            return None
        chosen = _target(decode, route.decode, Role.DECODE)
        first = _target(prefill, route.prefill, Role.PREFILL) if route.prefill else None
        if first is not None and _namespace(first.info, tenant) != _namespace(chosen.info, tenant):
            first = None  # their blocks are of different kinds: there is nothing to hand over
        return Placement(decode=chosen, prefill=first)

    @contextmanager
    def using(self, target: Target) -> Iterator[None]:
        """Count a request at `target` until its load reports do."""
        self._in_flight[target.worker] += 1
        try:
            yield
        finally:
            self._in_flight[target.worker] -= 1
            if not self._in_flight[target.worker]:
                del self._in_flight[target.worker]

    def remember(self, target: Target, tenant: TenantId, token_ids: Sequence[int]) -> None:
        """`target` has computed or loaded the blocks of these tokens."""
        scope = self.scope(target.info, tenant)
        self._memory.record(chain(scope.chain_root, token_ids, target.info.block_size), target.worker)
        if target.worker in self._breakers:
            del self._breakers[target.worker]

    def observe(self, usage: Usage, timings: Timings) -> None:
        """Learn from a worker's part in a request what computing and loading cost."""
        computed = usage.prompt_tokens - usage.cached_tokens - usage.loaded_tokens
        self._router.observe(
            Took(
                computed_tokens=computed,
                prefill_s=timings.prefill_s,
                loaded_tokens=usage.loaded_tokens,
                kv_wait_s=timings.kv_wait_s,
            )
        )

    def lost(self, target: Target) -> None:
        """`target` fell silent or broke off: avoid it for a while, and expect no blocks there."""
        now = self._clock.now()
        self._breakers = {w: b for w, b in self._breakers.items() if not b.can_attempt(now)}
        breaker = self._breakers.setdefault(target.worker, Breaker(failures=1, open_s=SUSPECT_S))
        attempt = breaker.attempt(now)
        if attempt is not None:
            breaker.fail(attempt, now)
        self._memory.forget(target.worker)

    def _able(
        self, model: str, role: Role, tokenizer_hash: str, avoid: Collection[Incarnation]
    ) -> list[tuple[WorkerView, EngineInfo]]:
        found = self.engines(model, role, tokenizer_hash)
        found = [(v, i) for v, i in found if (v.record.worker, v.record.epoch) not in avoid]
        now = self._clock.now()
        trusted = [(v, i) for v, i in found if self._is_trusted(v.record.worker, now)]
        return trusted or found  # a suspect is better than nobody

    def _is_trusted(self, worker: WorkerId, now: float) -> bool:
        breaker = self._breakers.get(worker)
        return breaker is None or breaker.can_attempt(now)

    def _candidate(
        self, view: WorkerView, info: EngineInfo, overlaps: Mapping[WorkerId, int], sticky: WorkerId
    ) -> Candidate:
        worker, load = view.record.worker, view.load or EngineLoad()
        return Candidate(
            worker=worker,
            cached_tokens=overlaps.get(worker, 0) * info.block_size,
            stored_tokens=overlaps.get(_STORES, 0) * info.block_size,
            running=max(load.running, self._in_flight[worker]),
            waiting=load.waiting,
            queued_tokens=load.queued_tokens,
            age_s=view.age_s,
            sticky=worker == sticky,
        )

    def _overlaps(
        self, infos: Collection[EngineInfo], tenant: TenantId, token_ids: Sequence[int]
    ) -> Mapping[WorkerId, int]:
        """Leading blocks by holder; what stores hold, any worker can load, and stands under `_STORES`."""
        found: dict[WorkerId, int] = {}
        engines = {info.worker for info in infos}
        for namespace, block_size in {(_namespace(i, tenant), i.block_size) for i in infos}:
            hashes = chain(chain_root(self._secret, tenant), token_ids, block_size)
            held = dict(self._memory.overlap(hashes))
            for holder, blocks in (self._index.overlap(namespace, hashes) if self._index else {}).items():
                key = holder if holder in engines else _STORES
                held[key] = max(held.get(key, 0), blocks)
            for holder, blocks in held.items():
                found[holder] = max(found.get(holder, 0), blocks)
        return found


_STORES = WorkerId("*stores*")


def _namespace(info: EngineInfo, tenant: TenantId) -> NamespaceId:
    return Namespace(
        tenant=tenant,
        model=info.model,
        revision=info.revision,
        tokenizer_hash=info.tokenizer_hash,
        precision=info.precision,
        kv_dtype=info.kv_dtype,
        block_size=info.block_size,
        layout_fingerprint=info.layout_fingerprint,
    ).id()


def _target(found: Sequence[tuple[WorkerView, EngineInfo]], worker: WorkerId, role: Role) -> Target:
    view, info = next((v, i) for v, i in found if v.record.worker == worker)
    return Target(worker=worker, role=role, address=view.record.address, epoch=view.record.epoch, info=info)
