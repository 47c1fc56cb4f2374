"""Settings that the prefill and the decode service share."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

from covey.config import CommonConfig, NonNegative, Positive, PositiveInt
from covey.policy.batch_limits import Batching, BatchLimits

from .limits import EngineLimits

_LIMITS = EngineLimits()


class EngineConfig(CommonConfig, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What one worker needs to know; every bound of its engine is one of these."""

    listen: str = "127.0.0.1:0"
    model: str = "smollm2"
    """A packaged model's name, a model folder, or a `.gguf` file."""
    model_name: str = ""
    """What the mesh calls the model; by default its own name."""
    cache_dir: str = ".covey/cache"
    """Where converted weights are kept; workers of one host map the same file."""
    context_limit: PositiveInt | None = None
    """A lower limit than the model's own."""
    block_size: PositiveInt = 32
    kv_bytes: PositiveInt = 1 << 30
    """Memory for keys and values. Its pages are taken when they are first used."""
    kv_blocks: PositiveInt | None = None
    """The same in blocks, in place of `kv_bytes`."""
    threads: PositiveInt | None = None
    """Cores to use at most; engines on one host divide theirs by who is busy."""
    kv_transport: Literal["auto", "grpc"] = "auto"
    """How blocks travel: `auto` maps the arena of a store on this host, `grpc` never does."""
    batching: Batching = _LIMITS.batch.batching
    """How requests are ordered and prompts cut."""
    max_batch_tokens: PositiveInt = _LIMITS.batch.max_tokens
    max_running: PositiveInt = _LIMITS.batch.max_running
    queue_max: Annotated[int, msgspec.Meta(ge=0)] = _LIMITS.batch.queue_max
    step_target_s: Positive = _LIMITS.batch.step_target_s
    outbox_tokens: PositiveInt = _LIMITS.outbox_tokens
    reader_stall_s: Positive = _LIMITS.reader_stall_s
    kv_timeout_s: Positive = _LIMITS.kv_timeout_s
    handover_ttl_s: Positive = _LIMITS.handover_ttl_s
    grace_s: NonNegative = _LIMITS.grace_s
    retain_max_s: NonNegative = _LIMITS.retain_max_s
    pinned_share: Annotated[float, msgspec.Meta(ge=0, le=1)] = _LIMITS.pinned_share
    writebacks_max: PositiveInt = _LIMITS.writebacks_max
    step_stall_s: Positive = _LIMITS.step_stall_s
    niceness: Annotated[int, msgspec.Meta(ge=0, le=19)] = _LIMITS.niceness

    def __post_init__(self) -> None:
        self.limits()

    def limits(self) -> EngineLimits:
        """The engine's bounds. Raises ValueError when they contradict each other."""
        return EngineLimits(
            batch=BatchLimits(
                batching=self.batching,
                max_tokens=self.max_batch_tokens,
                max_running=self.max_running,
                queue_max=self.queue_max,
                step_target_s=self.step_target_s,
                chunk_min=min(BatchLimits().chunk_min, self.max_batch_tokens),
            ),
            outbox_tokens=self.outbox_tokens,
            reader_stall_s=self.reader_stall_s,
            kv_timeout_s=self.kv_timeout_s,
            handover_ttl_s=self.handover_ttl_s,
            grace_s=self.grace_s,
            retain_max_s=self.retain_max_s,
            pinned_share=self.pinned_share,
            writebacks_max=self.writebacks_max,
            step_stall_s=self.step_stall_s,
            niceness=self.niceness,
        )
