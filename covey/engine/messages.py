"""What the engine's actor can be told and asked."""

from __future__ import annotations

from dataclasses import dataclass

from covey.actor import Ask
from covey.model.grammar import CompiledGrammar
from covey.policy.prefix_cache import CacheKey
from covey.types.generate import (
    AdoptReply,
    AdoptRequest,
    GenerateRequest,
    HandoverTicket,
    RetainReply,
    RetainRequest,
)
from covey.types.ids import RequestId

from .outbox import Outbox


@dataclass(frozen=True, slots=True, kw_only=True)
class Submit(Ask[None]):
    """Start a request; answered when the actor has taken it, everything else goes through the outbox."""

    request: GenerateRequest
    outbox: Outbox
    grammar: CompiledGrammar | None = None
    """The request's, compiled."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Abort:
    """The reader of this outbox is gone."""

    outbox: Outbox


@dataclass(frozen=True, slots=True, kw_only=True)
class Cancel:
    """The request is no longer wanted; also ends the leases of its hand-over."""

    request_id: RequestId


@dataclass(frozen=True, slots=True, kw_only=True)
class Wake:
    """Something changed that may let a step run."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Retain(Ask[RetainReply]):
    request: RetainRequest


@dataclass(frozen=True, slots=True, kw_only=True)
class Export(Ask[HandoverTicket]):
    request_id: RequestId


@dataclass(frozen=True, slots=True, kw_only=True)
class Adopt(Ask[AdoptReply]):
    request: AdoptRequest


@dataclass(frozen=True, slots=True, kw_only=True)
class Drain(Ask[None]):
    """Take nothing more; answered when nothing runs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ListKeys(Ask[tuple[CacheKey, ...]]):
    """Every block in the prefix cache."""


Message = Submit | Abort | Cancel | Wake | Retain | Export | Adopt | Drain | ListKeys
