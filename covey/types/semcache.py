"""The semcache contract: exact and semantic look-ups within one tenant's partition, offers, invalidation."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from covey.types.generate import FinishReason
from covey.types.ids import TenantId
from covey.types.limits import bounded
from covey.types.program import CacheOutcome

VALUE_CHARS_MAX = 1_048_576


TURNS_MAX = 16
EXAMPLES_MAX = 16


class CacheEventKind(StrEnum):
    """STORED: one entry, whole. REMOVED: entries by id. VOIDED: what an invalidation matched, by `epoch`."""

    STORED = "STORED"
    REMOVED = "REMOVED"
    VOIDED = "VOIDED"


class Verdict(StrEnum):
    RIGHT = "RIGHT"
    WRONG = "WRONG"
    STALE = "STALE"


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheQuery:
    """What to look for. `exact_key` covers the whole request; `context_key` all but the last user turn, `text`.

    An empty `exact_key` (sampled without a seed) skips the exact tier; an empty `text` the semantic one.
    An empty `category` lets the service classify. `turns` are the user turns before `text`, the last one last: a
    `text` that leans on them is rewritten by them before it is embedded. `load` is queue wait over objective of the
    model behind (0: idle); thresholds may relax with it. `wait_s` is how long to wait for another request that is
    computing the same answer. `examples_max` asks for near-misses to be shown to the model as examples.
    """

    tenant: TenantId = bounded(size=128)
    model: str = bounded(size=256)
    exact_key: bytes = bounded(size=64, default=b"")
    context_key: bytes = bounded(size=64, default=b"")
    text: str = bounded(size=65536, default="")
    category: str = bounded(size=64, default="")
    max_age_s: float = bounded(low=0, default=0.0)
    turns: tuple[str, ...] = bounded(size=TURNS_MAX, default=())
    load: float = bounded(low=0, high=1e6, default=0.0)
    wait_s: float = bounded(low=0, high=600, default=0.0)
    examples_max: int = bounded(low=0, high=EXAMPLES_MAX, default=0)
    example_tokens_max: int = bounded(low=0, high=1_048_576, default=0)


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
class Example:
    """An earlier request and its answer; `utility` is the predicted help to a model that sees it."""

    entry: str
    text: str
    answer: str
    similarity: float
    utility: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheReply:
    """`flight`: the caller computes for all who wait; it offers the answer with it, or abandons it.

    `relaxed`: only the load on the model behind allowed this hit.
    """

    outcome: CacheOutcome
    category: str = ""
    similarity: float = 0.0
    answer: CachedAnswer | None = None
    flight: str = ""
    relaxed: bool = False
    examples: tuple[Example, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheOffer:
    """An answer that may be kept; the service decides by the category's policy."""

    query: CacheQuery
    text: str = bounded(size=VALUE_CHARS_MAX)
    ids: tuple[int, ...] = bounded(size=1_048_576, default=())
    reason: FinishReason
    prompt_tokens: int = 0
    completion_tokens: int = 0
    flight: str = bounded(size=64, default="")
    tags: tuple[str, ...] = bounded(size=16, default=())
    examples: tuple[str, ...] = bounded(size=EXAMPLES_MAX, default=())
    """Entries that were shown to the model."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AbandonRequest:
    """The leader of a flight will not answer: those who wait go on by themselves, one of them as leader."""

    tenant: TenantId = bounded(size=128)
    flight: str = bounded(size=64)


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
    """Void entries of a tenant: those that match every field that is set, all of them when none is.

    `similar_to` with `similarity` matches by meaning, `older_than_s` by age. A dry run only counts.
    """

    tenant: TenantId = bounded(size=128)
    model: str = bounded(size=256, default="")
    category: str = bounded(size=64, default="")
    entry: str = bounded(size=128, default="")
    tag: str = bounded(size=64, default="")
    similar_to: str = bounded(size=65536, default="")
    similarity: float = bounded(low=0, high=1, default=0.0)
    older_than_s: float = bounded(low=0, default=0.0)
    dry_run: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class InvalidateReply:
    """`epoch` numbers the tenant's invalidations; a replica that has not reached it serves nothing of the tenant."""

    removed: int
    epoch: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheRecord:
    """A stored entry, whole: what replicas copy, `export` writes and `warm` reads."""

    entry: str = bounded(size=128)
    query: CacheQuery
    category: str = bounded(size=64)
    text: str = bounded(size=VALUE_CHARS_MAX)
    ids: tuple[int, ...] = bounded(size=1_048_576, default=())
    reason: FinishReason
    prompt_tokens: int = 0
    completion_tokens: int = 0
    age_s: float = bounded(low=0, default=0.0)
    vector: bytes = bounded(size=65536, default=b"")
    tags: tuple[str, ...] = bounded(size=16, default=())


@dataclass(frozen=True, slots=True, kw_only=True)
class WatchCacheRequest:
    """Events of a tenant's partitions after (`epoch`, `seq`); too old or of another epoch: a snapshot comes first."""

    tenant: TenantId = bounded(size=128)
    epoch: int = bounded(low=0, default=0)
    seq: int = bounded(low=0, default=0)


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheEvent:
    """A change of one tenant's entries at its writer; `seq` has no gaps within an `epoch`."""

    epoch: int
    seq: int
    kind: CacheEventKind
    record: CacheRecord | None = None
    entries: tuple[str, ...] = bounded(size=65536, default=())
    voided: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportCache:
    """All entries of a tenant, or those of one model or category."""

    tenant: TenantId = bounded(size=128)
    model: str = bounded(size=256, default="")
    category: str = bounded(size=64, default="")


@dataclass(frozen=True, slots=True, kw_only=True)
class WarmReply:
    stored: int
    refused: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RouteQuery:
    """Which of `models` (cheapest first) should answer; `load` is queue wait over objective of each."""

    tenant: TenantId = bounded(size=128)
    text: str = bounded(size=65536)
    models: tuple[str, ...] = bounded(size=16)
    load: tuple[float, ...] = bounded(size=16, default=())
    examples: tuple[Example, ...] = bounded(size=EXAMPLES_MAX, default=())


@dataclass(frozen=True, slots=True, kw_only=True)
class RouteReply:
    """`second`, when set, is worth asking too: the scores are close, and its answer teaches the router."""

    model: str
    decision: str
    second: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class RouteOutcome:
    """What came of a decision: `reward` 0 to 1, and how much help the examples were."""

    tenant: TenantId = bounded(size=128)
    decision: str = bounded(size=64)
    model: str = bounded(size=256)
    reward: float = bounded(low=0, high=1)


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
class CategoryStats:
    """One category: its hits, and the estimated share of wrong ones among them with a 95 % interval.

    `mode` is what it does now: a category that does not pay for its look-ups goes back to exact reuse.
    """

    category: str
    mode: str
    entries: int = 0
    size_bytes: int = 0
    lookups: int = 0
    hits: int = 0
    relaxed_hits: int = 0
    judged: int = 0
    false_hits: float = 0.0
    false_hits_low: float = 0.0
    false_hits_high: float = 0.0
    stale_hits: int = 0
    threshold: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheStats:
    entries: int = 0
    size_bytes: int = 0
    exact_hits: int = 0
    semantic_hits: int = 0
    misses: int = 0
    encoder_ready: bool = False
    categories: tuple[CategoryStats, ...] = ()
