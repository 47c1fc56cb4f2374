"""The gateway's parts put together, apart from what only a process has: sockets, registry, files."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from random import Random

import httpx
from opentelemetry.trace import NoOpTracer, Tracer
from prometheus_client import CollectorRegistry
from starlette.types import ASGIApp
from structlog.typing import FilteringBoundLogger

from covey.auth import ApiKeys
from covey.clock import Clock
from covey.net.rpc import Channels, Handlers
from covey.policy.admission import Admission
from covey.policy.pinning import PinPolicy
from covey.policy.rates import Rate, Rates
from covey.policy.routing import Router
from covey.types.ids import TenantId

from .answering import Answering
from .answers import Answers
from .completions import Completions
from .config import Config
from .dispatch import Dispatcher
from .errands import Errands
from .fleet import Directory, Fleet, PrefixIndex
from .gate import Gate
from .http.app import build_app
from .http.generations import Generations
from .http.operations import Operations
from .in_context import InContext
from .metrics import Metrics
from .models import Catalog, Model
from .programs.programs import Programs
from .remote import RemoteModels
from .rpc.inference import InferenceServicer
from .rpc.programs import ProgramsServicer

SECOND_ANSWERS_MAX = 4
"""Second answers under way that teach the choice of a model."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Surroundings:
    """What the gateway stands on."""

    channels: Channels
    directory: Directory
    index: PrefixIndex | None
    clock: Clock
    rng: Random
    registry: CollectorRegistry
    mesh_secret: bytes
    keys: ApiKeys
    models: Sequence[Model]
    remote_keys: Mapping[str, str]
    log: FilteringBoundLogger
    tracer: Tracer = field(default_factory=NoOpTracer)


@dataclass(frozen=True, slots=True, kw_only=True)
class Gateway:
    """Both edges, ready to be served."""

    app: ASGIApp
    handlers: Handlers
    operations: Operations
    completions: Completions
    programs: Programs


@asynccontextmanager
async def assembled(config: Config, around: Surroundings) -> AsyncIterator[Gateway]:
    """Own a gateway for a block; its programs and errands end with it."""
    clock, channels = around.clock, around.channels
    metrics = Metrics(around.registry)
    fleet = _fleet(config, around, metrics)
    catalog = Catalog(around.models, default=config.default_model, fleet=fleet)
    async with AsyncExitStack() as stack:
        errands = await stack.enter_async_context(Errands.open())
        client = await stack.enter_async_context(httpx.AsyncClient())
        answering = Answering(
            dispatcher=_dispatcher(config, around, fleet, metrics, errands),
            answers=_answers(config, around, fleet, errands),
            pins=PinPolicy(config.pinning.policy()),
            fleet=fleet,
            channels=channels,
            metrics=metrics,
            clock=clock,
        )
        completions = Completions(
            catalog=catalog,
            gate=Gate(
                Admission(config.admission.policy()),
                clock,
                metrics,
                wait_s=config.dispatch.queue_wait_s,
                weights={TenantId(name): tenant.weight for name, tenant in config.tenants.items()},
                rates=Rates(_rates(config), clock.now()),
            ),
            answering=answering,
            in_context=await stack.enter_async_context(_in_context(config, around, fleet)),
            remote=RemoteModels(client, around.remote_keys, clock).run,
            metrics=metrics,
            clock=clock,
            rng=around.rng,
            log=around.log,
            stream_events_max=config.dispatch.stream_events_max,
        )
        deadline_s = config.dispatch.deadline_s
        programs = await stack.enter_async_context(
            Programs.open(completions, catalog, clock, metrics, config.programs, deadline_s=deadline_s)
        )
        inference = InferenceServicer(
            completions=completions, catalog=catalog, channels=channels, clock=clock, deadline_s=deadline_s
        )
        operations = Operations(catalog=catalog, channels=channels, registry=around.registry, created=int(clock.wall()))
        generations = Generations(completions, clock, config.dispatch)
        yield Gateway(
            app=build_app(generations, operations, around.keys, config.body_bytes_max, around.tracer),
            handlers={**inference.handlers(), **ProgramsServicer(programs).handlers()},
            operations=operations,
            completions=completions,
            programs=programs,
        )


@asynccontextmanager
async def _in_context(config: Config, around: Surroundings, fleet: Fleet) -> AsyncIterator[InContext]:
    settings = config.in_context
    async with Errands.open(errands_max=SECOND_ANSWERS_MAX, timeout_s=settings.second_s) as second_answers:
        yield InContext(around.channels, fleet, around.clock, second_answers, settings)


def _rates(config: Config) -> dict[TenantId, Rate]:
    return {
        TenantId(name): Rate(requests_per_minute=tenant.requests_per_minute, tokens_per_minute=tenant.tokens_per_minute)
        for name, tenant in config.tenants.items()
    }


def _fleet(config: Config, around: Surroundings, metrics: Metrics) -> Fleet:
    router = Router(config.routing.policy())
    metrics.break_even.set_function(lambda: router.kv.break_even_tokens)
    return Fleet(around.directory, around.index, router, around.clock, around.mesh_secret)


def _answers(config: Config, around: Surroundings, fleet: Fleet, errands: Errands) -> Answers:
    return Answers(
        around.channels,
        fleet,
        around.clock,
        errands,
        exact_deadline_s=config.dispatch.exact_deadline_s,
        semantic_deadline_s=config.dispatch.semantic_deadline_s,
        flight_wait_s=config.dispatch.flight_wait_s,
    )


def _dispatcher(config: Config, around: Surroundings, fleet: Fleet, metrics: Metrics, errands: Errands) -> Dispatcher:
    return Dispatcher(
        around.channels,
        fleet,
        around.clock,
        metrics,
        config.dispatch,
        errands,
        waiting_max=config.admission.queue_max,
        retries_burst=config.admission.permits,
    )
