"""Settings of the semcache service."""

from __future__ import annotations

from dataclasses import replace

import msgspec

from covey.config import CommonConfig
from covey.policy.break_even import BreakEvenConfig
from covey.policy.relaxation import RelaxationConfig
from covey.policy.reuse import DEFAULT_CATEGORIES, CategoryPolicy, ReuseMode, ReuseScope
from covey.policy.reuse_guard import ALL_CHECKS, Check

from .accounts import AccountsConfig
from .minilm import PACKAGED
from .tutor import TutorConfig

EXAMPLES_MAX = 256
NEVER = 1 << 62
PLAIN = (
    "mode",
    "tau",
    "tau_min",
    "d_tau",
    "ttl_s",
    "ttl_max_s",
    "beta",
    "quota_entries",
    "quota_bytes",
    "scope",
    "delta",
    "false_hits_max",
)
"""Settings of a category that are fields of its policy as they are."""


class CategoryConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """`[semcache.categories.NAME]`: a new category, or what differs from a default one of that name.

    `examples` are requests of this category; with some in any category, requests that name no category are
    classified. `mode = "semantic"` is what switches semantic reuse on: no default category has it. `guard` is true,
    false, or a list of what must agree: numbers, quoted, paths, negation, opposites, order.
    """

    mode: ReuseMode | None = None
    tau: float | None = None
    tau_min: float | None = None
    d_tau: float | None = None
    ttl_s: float | None = None
    ttl_max_s: float | None = None
    beta: float | None = None
    quota_entries: int | None = None
    quota_bytes: int | None = None
    guard: bool | tuple[Check, ...] | None = None
    scope: ReuseScope | None = None
    delta: float | None = None
    false_hits_max: float | None = None
    examples: tuple[str, ...] = ()


class Config(CommonConfig, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Settings of the semcache service; every bound of the service is one of them."""

    listen: str = "127.0.0.1:0"
    encoder: str = PACKAGED
    """The packaged model, or the folder of another sentence-transformers model."""
    encoder_onnx: str = ""
    """An .onnx file of the same model, for ONNX Runtime where it is installed; empty runs it in torch."""
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
    """Where entries are kept: empty for a folder of this worker under `run_dir`, a folder, `redis://` or `valkey://`
    for what a fleet shares, or `memory:` for nowhere."""
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
    learnt: str = ""
    """A file of learnt decisions, as `python -m services.semcache.calibrate` writes it."""
    examples_max: int = 20_000
    """Earlier requests and answers kept for each tenant, to show to small models."""
    examples_bytes_max: int = 67_108_864
    shared_examples: bool = False
    """One pool of examples for all tenants; what holds personal data stays out of it."""
    judge_share: float = 0.02
    """Share of the semantic hits that a judge, where there is one, looks at in the background."""
    judge_model: str = ""
    """The model of the mesh that judges hits in the background; empty: nobody does."""
    judge_s: float = 30.0
    """Longest time of a judgement: about ten short answers of the model."""
    judge_queue: int = 16
    """Hits that wait to be judged; more are not judged."""
    pays_after: int = 200
    """Semantic look-ups of a category before it is asked whether they pay for themselves; 0 never asks."""
    load_low: float = 0.5
    """Queue wait over objective of the model from which thresholds relax."""
    load_high: float = 1.5
    """The same where they are relaxed in full."""
    load_smooth_s: float = 10.0
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
            "judge_s",
            "judge_queue",
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
        if not 0.0 <= self.judge_share <= 1.0:
            raise ValueError("judge_share must lie between 0 and 1")
        if self.pays_after < 0:
            raise ValueError("pays_after must not be negative")
        self.policies()
        self.accounts()

    def accounts(self) -> AccountsConfig:
        """Return how accounts of the categories are kept; raises `ValueError`."""
        return AccountsConfig(
            judge_share=self.judge_share,
            break_even=BreakEvenConfig(lookups_min=self.pays_after or NEVER),
            relaxation=RelaxationConfig(load_low=self.load_low, load_high=self.load_high, smooth_s=self.load_smooth_s),
        )

    def guarded(self) -> frozenset[str]:
        """Return the categories whose guard the configuration switches on, whatever else decides."""
        return frozenset(name for name, category in self.categories.items() if category.guard)

    def tutor(self) -> TutorConfig:
        """Bounds of the examples that small models are shown."""
        return TutorConfig(
            entries_max=self.examples_max,
            size_bytes_max=self.examples_bytes_max,
            shared=self.shared_examples,
            encode_s=self.encode_s,
        )

    def policies(self) -> tuple[CategoryPolicy, ...]:
        """Return the default categories with what the configuration changes, and its own; raises `ValueError`."""
        policies = {category.name: category for category in DEFAULT_CATEGORIES}
        for name, settings in self.categories.items():
            changes = {field: value for field in PLAIN if (value := getattr(settings, field)) is not None}
            if settings.guard is not None:
                changes["guard"] = bool(settings.guard)
                changes["checks"] = ALL_CHECKS if settings.guard is True else frozenset(settings.guard or ())
            policies[name] = replace(policies.get(name) or CategoryPolicy(name=name), **changes)
        return tuple(policies.values())

    def examples(self) -> dict[str, tuple[str, ...]]:
        """Return the examples of the categories that have some."""
        return {name: category.examples for name, category in self.categories.items() if category.examples}
