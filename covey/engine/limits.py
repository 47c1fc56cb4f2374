"""What bounds an engine."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from covey.policy.batch_limits import BatchLimits
from covey.policy.speculation import SpeculationLimits

from .promises import Admission

Loading = Literal["layers", "whole"]
"""Ways of bringing stored blocks in."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineLimits:
    """Bounds of everything that an engine holds or waits for."""

    batch: BatchLimits = field(default_factory=BatchLimits)
    admission: Admission = "reserve"
    """What a request is promised when it enters: its worst case, or what outputs of late came to."""
    speculation: SpeculationLimits = field(default_factory=SpeculationLimits)
    first_token_s: float = 2.0
    """When the first token of a request is due, for policies that order by it."""
    outbox_tokens: int = 1024
    """Tokens that wait for a slow reader before its request is paused."""
    reader_stall_s: float = 30.0
    """A request paused for this long fails."""
    kv_timeout_s: float = 5.0
    """One look-up and load, or one store. What is not there by then is computed instead."""
    loading: Loading = "layers"
    """Whether a sequence runs through the first layers of its stored blocks while the others are being loaded."""
    layers_min_bytes: int = 8 << 20
    """Smaller loads come whole: going layer by layer costs more than it hides."""
    ahead_bytes: int = 64 << 20
    """Bytes of unfinished prompts that may be on their way to the store at once; 0: all is stored at hand-over."""
    lend_share: float = 0.0
    """The share of the pool that may hold blocks of other workers' sequences; 0: none is lent."""
    borrow_blocks: int = 0
    """Blocks of one sequence that may live with other workers, beyond the pool; 0: none do."""
    loan_ttl_s: float = 10.0
    """How long lent blocks are kept after their owner's last sign of life."""
    handover_ttl_s: float = 15.0
    """How long prefill keeps its leases for the decode worker to come."""
    grace_s: float = 1.0
    """How long a finished request's blocks wait for `retain`."""
    retain_max_s: float = 600.0
    """The longest time-to-live that `retain` grants."""
    pinned_share: float = 0.5
    """The share of the pool that pins may hold."""
    writebacks_max: int = 4
    """Demotions that run at once; more are dropped, which costs only a recomputation."""
    progress_s: float = 0.2
    """How often a silent stream shows a sign of life."""
    step_stall_s: float = 10.0
    """A step that takes longer is stuck: streams then go silent, so that watchdogs notice."""
    niceness: int = 5
    """How far the computing threads' priority is below that of the mesh's event loops."""

    def __post_init__(self) -> None:
        if not 0 <= self.pinned_share <= 1 or self.outbox_tokens < 1 or self.ahead_bytes < 0:
            raise ValueError("pinned_share must be between 0 and 1, outbox_tokens at least 1, ahead_bytes at least 0")
        if not 0 <= self.lend_share <= 1 or self.borrow_blocks < 0 or self.loan_ttl_s <= 0:
            raise ValueError("lend_share must be between 0 and 1, borrow_blocks at least 0 and loan_ttl_s positive")
