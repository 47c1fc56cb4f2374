"""The semcache contract: exact and semantic look-ups within one tenant's partition, offers, invalidation."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from covey.types.generate import FinishReason
from covey.types.ids import TenantId
from covey.types.limits import bounded
from covey.types.program import CacheOutcome

VALUE_CHARS_MAX = 1_048_576


class Verdict(StrEnum):
    RIGHT = "RIGHT"
    WRONG = "WRONG"
    STALE = "STALE"


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheQuery:
    """What to look for. `exact_key` covers the whole request; `context_key` all but the last user turn, `text`.

    An empty `exact_key` (sampled without a seed) skips the exact tier; an empty `text` the semantic one.
    An empty `category` lets the service classify.
    """

    tenant: TenantId = bounded(size=128)
    model: str = bounded(size=256)
    exact_key: bytes = bounded(size=64, default=b"")
    context_key: bytes = bounded(size=64, default=b"")
    text: str = bounded(size=65536, default="")
    category: str = bounded(size=64, default="")
    max_age_s: float = bounded(low=0, default=0.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class CachedAnswer:
    """A stored answer, replayed as if it had just been generated, and marked."""

    entry: str
    text: str
    ids: tuple[int, ...]
    reason: FinishReason
    prompt_tokens: int
    completion_tokens: int
    age_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheReply:
    outcome: CacheOutcome
    category: str = ""
    similarity: float = 0.0
    answer: CachedAnswer | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheOffer:
    """An answer that may be kept; the service decides by the category's policy."""

    query: CacheQuery
    text: str = bounded(size=VALUE_CHARS_MAX)
    ids: tuple[int, ...] = bounded(size=1_048_576, default=())
    reason: FinishReason
    prompt_tokens: int = 0
    completion_tokens: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class OfferReply:
    stored: bool
    entry: str = ""
    why: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class FeedbackRequest:
    tenant: TenantId = bounded(size=128)
    entry: str = bounded(size=128)
    verdict: Verdict


@dataclass(frozen=True, slots=True, kw_only=True)
class InvalidateRequest:
    """Void entries of a tenant; empty `model`, `category` and `entry` mean all of them."""

    tenant: TenantId = bounded(size=128)
    model: str = bounded(size=256, default="")
    category: str = bounded(size=64, default="")
    entry: str = bounded(size=128, default="")


@dataclass(frozen=True, slots=True, kw_only=True)
class InvalidateReply:
    removed: int


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheExplanation:
    """Why a query would or would not hit: the category, its threshold, and the nearest entry."""

    category: str
    mode: str
    threshold: float
    ttl_s: float
    similarity: float = 0.0
    entry: str = ""
    why: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheStats:
    entries: int = 0
    size_bytes: int = 0
    exact_hits: int = 0
    semantic_hits: int = 0
    misses: int = 0
    encoder_ready: bool = False
