"""Settings of the gateway."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

from covey.config import CommonConfig, NonNegative, Positive, PositiveInt, TenantConfig
from covey.policy.admission import AdmissionConfig
from covey.policy.pinning import PinConfig
from covey.policy.routing import RouteConfig, Split

Share = Annotated[float, msgspec.Meta(gt=0, le=1)]


class ModelConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A model by its public name: served by workers that announce it, or `remote` at an OpenAI-compatible `url`."""

    name: str
    source: str = ""
    """Where its tokenizer is (see `covey.model.source`); empty: the name says it."""
    url: str = ""
    """Base URL up to and including `/v1`; requests are passed on there."""
    remote_name: str = ""
    """What the model is called at `url`; empty: the same."""
    api_key_file: str = ""
    context_limit: Annotated[int, msgspec.Meta(ge=1)] = 131_072
    """Of a remote model; a local one's is its own."""


class AdmissionSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """How many requests run and wait at this gateway."""

    permits: PositiveInt = 256
    queue_max: Annotated[int, msgspec.Meta(ge=0)] = 1024
    tenant_share: Share = 0.5

    def policy(self) -> AdmissionConfig:
        return AdmissionConfig(permits=self.permits, queue_max=self.queue_max, tenant_share=self.tenant_share)


class RoutingSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Thresholds of the routing policy, in tokens of prefill work."""

    split: Literal["never", "always", "auto"] = "auto"
    split_min_tokens: Annotated[int, msgspec.Meta(ge=0)] = 64
    handover_tokens: Annotated[int, msgspec.Meta(ge=0)] = 32
    load_tokens: NonNegative = 4.0
    """What any load of stored keys and values costs, at first: it is learned from what requests took."""
    load_factor: NonNegative = 0.05
    """What loading a token's keys and values costs, at first."""
    amid_factor: Annotated[float, msgspec.Meta(ge=1)] = 1.5
    sticky_tokens: NonNegative = 256.0
    stale_s: Positive = 5.0

    def policy(self) -> RouteConfig:
        return RouteConfig(
            split=Split(self.split),
            split_min_tokens=self.split_min_tokens,
            handover_tokens=self.handover_tokens,
            load_tokens=self.load_tokens,
            load_factor=self.load_factor,
            amid_factor=self.amid_factor,
            sticky_tokens=self.sticky_tokens,
            stale_s=self.stale_s,
        )


class PinSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """How long blocks stay pinned while a tool runs."""

    slack: Annotated[float, msgspec.Meta(ge=1)] = 1.5
    margin_s: NonNegative = 0.5
    unknown_s: Positive = 2.0
    ttl_max_s: Annotated[float, msgspec.Meta(gt=0, le=3600)] = 60.0

    def policy(self) -> PinConfig:
        return PinConfig(slack=self.slack, margin_s=self.margin_s, unknown_s=self.unknown_s, ttl_max_s=self.ttl_max_s)


class DispatchSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Deadlines and bounds of one request's way over the workers."""

    deadline_s: Annotated[float, msgspec.Meta(gt=0, le=86400)] = 600.0
    """For requests that state none."""
    queue_wait_s: Positive = 30.0
    """How long a request waits for a worker that has room before it is answered with 503."""
    event_gap_s: Positive = 2.0
    """A worker silent for longer is abandoned; workers send an event every 250 ms."""
    migrations_max: Annotated[int, msgspec.Meta(ge=0)] = 2
    exact_deadline_s: Positive = 0.5
    """Of the look-up of an equal request, which comes before any work: a hit spares all of it. Generous, since a
    semcache that loads its encoder beside busy engines stalls for a third of a second now and then."""
    semantic_deadline_s: Positive = 0.05
    """Of the look-up of a similar request, which runs beside the workers: it may hold the first token up so long."""
    flight_wait_s: Annotated[float, msgspec.Meta(ge=0, le=600)] = 30.0
    """How long a request waits for an equal one that is being answered, rather than ask a worker too; 0 switches that
    off."""
    stream_events_max: PositiveInt = 1024
    """Events kept for a client that reads slowly; then its stream is closed with an error."""
    heartbeat_s: Positive = 10.0


class InContextSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A model name that stands for several: each request goes to one of them, small ones with earlier answers shown."""

    name: str = "auto"
    models: tuple[str, ...] = ()
    """The models to choose from, the cheapest first; empty: there is no such name."""
    examples_max: Annotated[int, msgspec.Meta(ge=0, le=16)] = 3
    example_tokens_max: Annotated[int, msgspec.Meta(ge=0)] = 768
    deadline_s: Positive = 0.25
    """Of each question to semcache; later ones go on without: the last of `models` answers."""
    second_s: Positive = 60.0
    """How long the second answer of a request may take that teaches the choice."""


class ProgramSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Bounds of programs held in memory."""

    programs_max: PositiveInt = 10_000
    calls_max: Annotated[int, msgspec.Meta(ge=1, le=10_000)] = 10_000
    running_max: PositiveInt = 64
    """Calls of one program that run at once; the others wait for their turn by objective."""
    bytes_max: PositiveInt = 64 * 1024 * 1024
    """Text that one program may hold."""


class Config(CommonConfig, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Settings of the gateway service."""

    http_listen: str = "127.0.0.1:8000"
    grpc_listen: str = "127.0.0.1:8001"
    mesh_secret_file: str | None = None
    """Tenants' KV chains grow from this secret; without a file each start makes up a new one, and caches start cold."""
    body_bytes_max: PositiveInt = 16 * 1024 * 1024
    default_model: str = ""
    """What a call without a model gets; empty: the first of `models`."""
    models: tuple[ModelConfig, ...] = (ModelConfig(name="smollm2"),)
    tenants: dict[str, TenantConfig] = msgspec.field(default_factory=dict)
    admission: AdmissionSettings = AdmissionSettings()
    routing: RoutingSettings = RoutingSettings()
    pinning: PinSettings = PinSettings()
    dispatch: DispatchSettings = DispatchSettings()
    programs: ProgramSettings = ProgramSettings()
    in_context: InContextSettings = InContextSettings()

    def __post_init__(self) -> None:
        names = [m.name for m in self.models]
        if len(set(names)) != len(names):
            raise ValueError("models: two models have the same name")
        if unknown := [name for name in self.in_context.models if name not in names]:
            raise ValueError(f"in_context.models: no model {unknown[0]!r} in models")
        if self.in_context.models and self.in_context.name in names:
            raise ValueError("in_context.name: a model of models has this name")
        if self.default_model and self.default_model not in names:
            raise ValueError(f"default_model: no model {self.default_model!r} in models")
        if self.pinning.unknown_s > self.pinning.ttl_max_s:
            raise ValueError("pinning.unknown_s must not exceed pinning.ttl_max_s")
