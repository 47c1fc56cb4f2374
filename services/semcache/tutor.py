"""Helps small models: shows them earlier answers, and says which model of a mesh should answer (IC-Cache)."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from random import Random
from typing import Any

import anyio
import numpy as np
from numpy.typing import NDArray

from covey.clock import Clock
from covey.errors import CoveyError, InvalidArgument, NotFound
from covey.policy.model_choice import Arm, ModelChoice
from covey.policy.personal_data import personal_data
from covey.policy.request_features import FEATURES, request_features
from covey.types.ids import TenantId
from covey.types.semcache import CacheOffer, CacheQuery, Example, RouteOutcome, RouteQuery, RouteReply

from .encoder import Embedder
from .example_pool import ExamplePool
from .vectors import Vectors

DECISIONS_MAX = 4096
"""Choices of a model whose outcome may still come."""
CLUSTER_EVERY_S = 5.0
SHARED = TenantId("")
"""The pool that every tenant reads and adds to, where the configuration allows one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TutorConfig:
    """Bounds of the pools, each of `entries_max` and `size_bytes_max`; with `shared` there is one for all tenants.

    Nothing that holds personal data enters a shared pool.
    """

    pools_max: int = 256
    entries_max: int = 20_000
    size_bytes_max: int = 67_108_864
    shared: bool = False
    encode_s: float = 0.25


@dataclass(frozen=True, slots=True, kw_only=True)
class _Decision:
    tenant: TenantId
    text: str
    vector: Vectors | None
    features: NDArray[Any]
    models: tuple[str, ...]
    examples: tuple[str, ...]


class Tutor:
    """Examples and the choice of a model, by tenant. Owned by the event loop; loses nothing but help when it ends."""

    def __init__(self, embedder: Embedder, config: TutorConfig, *, clock: Clock, rng: Random) -> None:
        self._embedder = embedder
        self._config = config
        self._clock = clock
        self._rng = rng
        self._draws = np.random.default_rng(rng.getrandbits(64))
        self._pools: OrderedDict[TenantId, ExamplePool] = OrderedDict()
        self._choices: OrderedDict[TenantId, ModelChoice] = OrderedDict()
        self._decisions: OrderedDict[str, _Decision] = OrderedDict()
        self._clustering = anyio.CapacityLimiter(1)

    async def run(self) -> None:
        """Cluster pools that have grown, until cancelled."""
        while True:
            await anyio.sleep(CLUSTER_EVERY_S)
            for pool in tuple(self._pools.values()):
                await pool.cluster(self._clustering)

    async def examples(self, query: CacheQuery) -> tuple[Example, ...]:
        """Return what a model may be shown for a query; nothing when the encoder is late."""
        vector = await self._vector(query.tenant, query.text) if query.text else None
        if vector is None:
            return ()
        return self._pool(query.tenant).find(
            query.text,
            vector,
            category=query.category,
            count=query.examples_max,
            tokens_max=query.example_tokens_max or 1 << 20,
        )

    async def offer(self, offer: CacheOffer, entry: str) -> None:
        """Keep an answer as an example for others; one that was given with examples itself teaches no one."""
        query = offer.query
        if not query.text or not offer.text or offer.examples:
            return
        if self._config.shared and (personal_data(query.text) or personal_data(offer.text)):
            return
        vector = await self._vector(query.tenant, query.text)
        if vector is not None:
            self._pool(query.tenant).add(
                entry or f"{self._rng.getrandbits(128):032x}",
                query.text,
                offer.text,
                owner=query.tenant,
                model=query.model,
                category=query.category,
                vector=vector,
                now=self._clock.now(),
            )

    def remove(self, tenant: TenantId, entry: str) -> None:
        """Forget an example whose answer proved wrong."""
        self._pool(tenant).remove(entry)

    def forget(self, tenant: TenantId) -> None:
        """Drop all that is known of a tenant's requests, also from a shared pool."""
        self._choices.pop(tenant, None)
        if tenant in self._pools:
            del self._pools[tenant]
        for pool in self._pools.values():
            pool.forget(tenant)

    async def route(self, query: RouteQuery) -> RouteReply:
        """Choose the model for a request. Raises `InvalidArgument` for no models."""
        if not query.models:
            raise InvalidArgument("name the models to choose from", field="models")
        vector = await self._vector(query.tenant, query.text)
        outcomes = self._pool(query.tenant).outcomes(vector, query.models) if vector is not None else []
        features = request_features(query.text, outcomes)
        last = max(1, len(query.models) - 1)
        arms = [
            Arm(model=model, cost=i / last, load=query.load[i] if i < len(query.load) else 0.0)
            for i, model in enumerate(query.models)
        ]
        chosen = self._choice(query.tenant).choose(features, arms, self._draws)
        decision = f"{self._rng.getrandbits(128):032x}"
        self._decisions[decision] = _Decision(
            tenant=query.tenant, text=query.text, vector=vector, features=features, models=query.models,
            examples=tuple(example.entry for example in query.examples),
        )  # fmt: skip
        while len(self._decisions) > DECISIONS_MAX:
            self._decisions.popitem(last=False)
        return RouteReply(model=chosen.model, decision=decision, second=chosen.second)

    def learn(self, outcome: RouteOutcome) -> None:
        """Take what a model earned by a decision. Raises `NotFound` and `InvalidArgument`."""
        decision = self._decisions.get(outcome.decision)
        if decision is None or decision.tenant != outcome.tenant:
            raise NotFound("there is no such decision (any more)", field="decision")
        if outcome.model not in decision.models:
            raise InvalidArgument("the decision was between other models", field="model")
        self._choice(outcome.tenant).observe(decision.features, outcome.model, outcome.reward)
        if decision.vector is None:
            return
        pool, now = self._pool(outcome.tenant), self._clock.now()
        cost = decision.models.index(outcome.model) / max(1, len(decision.models) - 1)
        for entry in decision.examples:
            pool.helped(entry, decision.text, decision.vector, category="", reward=outcome.reward, cost=cost, now=now)
        pool.remember(outcome.tenant, decision.text, decision.vector, outcome.model, outcome.reward)

    async def _vector(self, tenant: TenantId, text: str) -> Vectors | None:
        if not self._embedder.ready or not text:
            return None
        try:
            return (await self._embedder.one(tenant, text, timeout_s=self._config.encode_s)).vector
        except CoveyError:  # the request goes on without help, whatever ails the encoder
            return None

    def _pool(self, tenant: TenantId) -> ExamplePool:
        owner = SHARED if self._config.shared else tenant
        if owner not in self._pools:
            self._pools[owner] = ExamplePool(
                entries_max=self._config.entries_max, size_bytes_max=self._config.size_bytes_max, rng=self._rng
            )
        self._pools.move_to_end(owner)
        while len(self._pools) > self._config.pools_max:
            self._pools.popitem(last=False)
        return self._pools[owner]

    def _choice(self, tenant: TenantId) -> ModelChoice:
        if tenant not in self._choices:
            self._choices[tenant] = ModelChoice(FEATURES)
        self._choices.move_to_end(tenant)
        while len(self._choices) > self._config.pools_max:
            self._choices.popitem(last=False)
        return self._choices[tenant]
