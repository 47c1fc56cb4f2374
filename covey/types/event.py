"""Everything that travels on NATS: small, carrying ids, never content."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

from covey.types.generate import EngineInfo, EngineLoad, Role
from covey.types.ids import RequestId, TenantId, WorkerId
from covey.types.kv import StoreInfo
from covey.types.limits import bounded


class WorkerState(StrEnum):
    STARTING = "STARTING"
    READY = "READY"
    DRAINING = "DRAINING"


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerRecord:
    """A registry entry: who is there, where, and what it can do. `host` is the boot id."""

    worker: WorkerId
    role: Role
    address: str
    epoch: int
    state: WorkerState
    host: str = ""
    pid: int = 0
    engine: EngineInfo | None = None
    store: StoreInfo | None = None
    metrics_address: str = ""
    labels: Mapping[str, str] = bounded(size=32, default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadReport:
    """Heartbeat, once a second: how busy a worker is."""

    epoch: int
    seq: int
    schema: int
    worker: WorkerId
    role: Role
    load: EngineLoad


@dataclass(frozen=True, slots=True, kw_only=True)
class CancelHint:
    """Best-effort word that a request is no longer wanted."""

    epoch: int
    seq: int
    schema: int
    worker: WorkerId
    request_id: RequestId


@dataclass(frozen=True, slots=True, kw_only=True)
class Invalidation:
    """Cache entries of a tenant are void; empty `model` and `category` mean all of them."""

    epoch: int
    seq: int
    schema: int
    worker: WorkerId
    tenant: TenantId
    model: str = ""
    category: str = ""
