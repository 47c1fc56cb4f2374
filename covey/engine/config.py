"""Settings that the prefill and the decode service share."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

from covey.config import CommonConfig, NonNegative, Positive, PositiveInt
from covey.policy.batch_limits import Batching, BatchLimits
from covey.policy.speculation import SpeculationLimits

from .limits import EngineLimits, Loading
from .promises import Admission

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
    device: Literal["cpu", "cuda"] = "cpu"
    """Where the model runs. On `cuda`, `precision` is `fp32` or `bf16`; no GPU has run it yet: see docs/gpu.md."""
    precision: Literal["fp32", "bf16", "int8"] = "fp32"
    """What weights and products are computed in. `fp32` is the reference; `int8` is the fastest."""
    kv_dtype: Literal["auto", "fp32", "fp16", "int8"] = "auto"
    """What keys and values are kept in: half or a quarter of the memory, and of the bytes that move. `auto` is `fp32`
    beside weights in `fp32`, else `fp16`."""
    block_size: PositiveInt = 32
    kv_bytes: PositiveInt = 1 << 30
    """Memory for keys and values. Its pages are taken when they are first used."""
    kv_blocks: PositiveInt | None = None
    """The same in blocks, in place of `kv_bytes`."""
    threads: PositiveInt | None = None
    """Cores to use at most; engines on one host divide theirs by who is busy."""
    kv_transport: Literal["auto", "shm", "grpc", "tcp"] = "auto"
    """How blocks travel: `auto` maps the arena of a store on this host, else takes its bulk TCP channel where it has
    one, else gRPC; the others force one way.
    """
    kv_codecs: tuple[Literal["FP16", "INT8", "PQ4"], ...] = ()
    """Lossy codecs that this worker takes blocks in; answers may then differ. Workers with other ones share no blocks
    with it: what is computed from such blocks is not exact either.
    """
    kv_codebook: str | None = None
    """The codebook of PQ4, the same file as the stores'."""
    batching: Batching = _LIMITS.batch.batching
    """How requests are ordered and prompts cut."""
    admission: Admission = _LIMITS.admission
    """What a request is promised before it runs: `reserve` its longest possible answer, so that it is never preempted,
    `past_future` what answers of late came to, so that more run at once.
    """
    speculation: Literal["auto", "off"] = "auto"
    """Whether text that repeats itself is guessed ahead, where that pays; what is generated is the same."""
    guess_max: PositiveInt = _LIMITS.speculation.guess_max
    """Guesses a request and step."""
    first_token_s: Positive = _LIMITS.first_token_s
    """When a request's first token is due, for the policies that order by it."""
    max_batch_tokens: PositiveInt = _LIMITS.batch.max_tokens
    max_running: PositiveInt = _LIMITS.batch.max_running
    queue_max: Annotated[int, msgspec.Meta(ge=0)] = _LIMITS.batch.queue_max
    step_target_s: Positive = _LIMITS.batch.step_target_s
    outbox_tokens: PositiveInt = _LIMITS.outbox_tokens
    reader_stall_s: Positive = _LIMITS.reader_stall_s
    kv_timeout_s: Positive = _LIMITS.kv_timeout_s
    kv_loading: Loading = _LIMITS.loading
    """`layers`: a request runs through the first layers of its stored blocks while the others are still being loaded;
    `whole`: it waits for all of them. What is generated is the same.
    """
    ahead_bytes: Annotated[int, msgspec.Meta(ge=0)] = _LIMITS.ahead_bytes
    """Bytes of unfinished prompts on their way to the store at once; with 0 all is stored at hand-over."""
    lend_share: Annotated[float, msgspec.Meta(ge=0, le=1)] = _LIMITS.lend_share
    """The share of the pool that other decode workers' long contexts may have; 0: none. On a CPU only."""
    borrow_blocks: Annotated[int, msgspec.Meta(ge=0)] = _LIMITS.borrow_blocks
    """Blocks of a context longer than the pool that other decode workers may keep; 0: none. On a CPU only."""
    loan_ttl_s: Positive = _LIMITS.loan_ttl_s
    handover_ttl_s: Positive = _LIMITS.handover_ttl_s
    grace_s: NonNegative = _LIMITS.grace_s
    retain_max_s: NonNegative = _LIMITS.retain_max_s
    pinned_share: Annotated[float, msgspec.Meta(ge=0, le=1)] = _LIMITS.pinned_share
    writebacks_max: PositiveInt = _LIMITS.writebacks_max
    step_stall_s: Positive = _LIMITS.step_stall_s
    stuck_exit_s: Positive = 120.0
    """When a step or the event loop is held up for this long, the process exits with code 1, to be started anew."""
    niceness: Annotated[int, msgspec.Meta(ge=0, le=19)] = _LIMITS.niceness

    def __post_init__(self) -> None:
        self.limits()
        if "PQ4" in self.kv_codecs and self.kv_codebook is None:
            raise ValueError("kv_codecs has PQ4: name its codebook in kv_codebook")

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
            admission=self.admission,
            speculation=SpeculationLimits(guess_max=self.guess_max if self.speculation == "auto" else 0),
            first_token_s=self.first_token_s,
            outbox_tokens=self.outbox_tokens,
            reader_stall_s=self.reader_stall_s,
            kv_timeout_s=self.kv_timeout_s,
            loading=self.kv_loading,
            ahead_bytes=self.ahead_bytes,
            lend_share=self.lend_share,
            borrow_blocks=self.borrow_blocks,
            loan_ttl_s=self.loan_ttl_s,
            handover_ttl_s=self.handover_ttl_s,
            grace_s=self.grace_s,
            retain_max_s=self.retain_max_s,
            pinned_share=self.pinned_share,
            writebacks_max=self.writebacks_max,
            step_stall_s=self.step_stall_s,
            niceness=self.niceness,
        )
