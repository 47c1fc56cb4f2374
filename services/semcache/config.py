"""Settings of the semcache service."""

from __future__ import annotations

from dataclasses import replace

import msgspec

from covey.config import CommonConfig
from covey.policy.reuse import DEFAULT_CATEGORIES, CategoryPolicy, ReuseMode

from .minilm import PACKAGED

EXAMPLES_MAX = 256


class CategoryConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """`[semcache.categories.NAME]`: a new category, or what differs from a default one of that name.

    `examples` are requests of this category; with some in any category, requests that name no category are
    classified. `mode = "semantic"` is what switches semantic reuse on: no default category has it.
    """

    mode: ReuseMode | None = None
    tau: float | None = None
    ttl_s: float | None = None
    quota_entries: int | None = None
    guard: bool | None = None
    examples: tuple[str, ...] = ()


class Config(CommonConfig, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Settings of the semcache service; every bound of the service is one of them."""

    listen: str = "127.0.0.1:0"
    encoder: str = PACKAGED
    """The packaged model, or the folder of another sentence-transformers model."""
    preload: bool = True
    """Load the encoder at start, in the background; without it the first semantic look-up or Embed does, and waits."""
    encoder_threads: int = 1
    encoder_queue: int = 64
    encode_batch: int = 8
    """Texts encoded at once; an Embed of more goes through in as many turns, so that look-ups pass in between."""
    encode_s: float = 0.25
    """Longest wait of a look-up for its vector; a later one is a miss."""
    embed_wait_s: float = 30.0
    """Longest wait of an Embed call without a deadline of its own."""
    memo_max: int = 1024
    entries_max: int = 100_000
    size_bytes_max: int = 268_435_456
    entry_size_bytes_max: int = 1_048_576
    tenant_entries_max: int = 0
    """The most entries of one tenant; 0 is no limit of its own."""
    tenant_size_bytes_max: int = 0
    documents: str = ""
    """Where entries are kept: empty for a folder of this worker under `run_dir`, a folder, or `memory:` for nowhere."""
    documents_bytes_max: int = 4_294_967_296
    """The most that the documents may take on disk."""
    recent_bytes_max: int = 67_108_864
    """Documents kept in memory because they were just stored or served."""
    exact_search_max: int = 4096
    """Vectors of one context that are compared one by one; above it an hnsw index is built in the background."""
    neighbours: int = 4
    classify_floor: float = 0.3
    """Least similarity to a category's examples; farther requests are `general`."""
    sweep_s: float = 1.0
    flights_max: int = 4096
    """Different requests that others may wait for at a time."""
    flight_waiting_max: int = 256
    """Requests that wait for one other; more compute their answers themselves."""
    flight_lease_s: float = 60.0
    """A request that others wait for is given up when it has not answered for so long."""
    categories: dict[str, CategoryConfig] = msgspec.field(default_factory=dict)

    def __post_init__(self) -> None:
        for field in (
            "encoder_threads",
            "encoder_queue",
            "encode_batch",
            "memo_max",
            "entries_max",
            "size_bytes_max",
            "entry_size_bytes_max",
            "documents_bytes_max",
            "recent_bytes_max",
            "exact_search_max",
            "neighbours",
            "encode_s",
            "embed_wait_s",
            "sweep_s",
            "flights_max",
            "flight_waiting_max",
            "flight_lease_s",
        ):
            if not getattr(self, field) > 0:
                raise ValueError(f"{field} must be over 0")
        if self.entry_size_bytes_max > self.size_bytes_max:
            raise ValueError("entry_size_bytes_max must not be over size_bytes_max")
        if self.tenant_entries_max < 0 or self.tenant_size_bytes_max < 0:
            raise ValueError("tenant_entries_max and tenant_size_bytes_max must not be negative")
        if not -1.0 <= self.classify_floor <= 1.0:
            raise ValueError("classify_floor must lie between -1 and 1")
        if any(len(category.examples) > EXAMPLES_MAX for category in self.categories.values()):
            raise ValueError(f"categories: at most {EXAMPLES_MAX} examples each")
        self.policies()

    def policies(self) -> tuple[CategoryPolicy, ...]:
        """Return the default categories with what the configuration changes, and its own; raises `ValueError`."""
        policies = {category.name: category for category in DEFAULT_CATEGORIES}
        for name, settings in self.categories.items():
            changes = {
                field: value
                for field in ("mode", "tau", "ttl_s", "quota_entries", "guard")
                if (value := getattr(settings, field)) is not None
            }
            policies[name] = replace(policies.get(name) or CategoryPolicy(name=name), **changes)
        return tuple(policies.values())

    def examples(self) -> dict[str, tuple[str, ...]]:
        """Return the examples of the categories that have some."""
        return {name: category.examples for name, category in self.categories.items() if category.examples}
