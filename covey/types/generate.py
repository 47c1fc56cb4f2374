"""What a worker is asked to generate and the events it answers with: the `Engine` contract."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

from covey.types.ids import BlockHash, CallId, LeaseId, NamespaceId, ProgramId, RequestId, TenantId, WorkerId
from covey.types.limits import bounded

PROMPT_TOKENS_MAX = 1_048_576
STOPS_MAX = 16
STOP_CHARS_MAX = 256


class Role(StrEnum):
    PREFILL = "PREFILL"
    DECODE = "DECODE"
    KVSTORE = "KVSTORE"
    SEMCACHE = "SEMCACHE"
    AGENTFLOW = "AGENTFLOW"
    GATEWAY = "GATEWAY"


class FinishReason(StrEnum):
    STOP = "STOP"
    LENGTH = "LENGTH"
    TOOL_CALLS = "TOOL_CALLS"
    CANCELLED = "CANCELLED"


class Stage(StrEnum):
    QUEUE = "QUEUE"
    LOOKUP = "LOOKUP"
    TRANSFER = "TRANSFER"
    PREFILL = "PREFILL"
    DECODE = "DECODE"


class Afterwards(StrEnum):
    """What happens to retained blocks when their time-to-live ends."""

    DROP = "DROP"
    DEMOTE = "DEMOTE"


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How the next token is chosen. Temperature 0 is greedy. The gateway always sets `seed`."""

    max_tokens: int = bounded(low=1, high=PROMPT_TOKENS_MAX)
    seed: int = bounded(low=0, high=2**63 - 1, default=0)
    temperature: float = bounded(low=0, high=100, default=0.0)
    top_p: float = bounded(low=0, high=1, default=1.0)
    top_k: int = bounded(low=0, default=0)
    min_p: float = bounded(low=0, high=1, default=0.0)
    presence_penalty: float = bounded(low=-2, high=2, default=0.0)
    frequency_penalty: float = bounded(low=-2, high=2, default=0.0)
    repetition_penalty: float = bounded(low=0.01, high=100, default=1.0)
    logit_bias: Mapping[int, float] = bounded(size=1024, default_factory=dict)
    logprobs: int | None = bounded(low=0, high=20, default=None)
    min_tokens: int = bounded(low=0, default=0)
    ignore_eos: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class KvScope:
    """Where a stretch of a prompt's blocks lives: `blocks` of the chain from `chain_root` (0: the rest)."""

    namespace: NamespaceId = bounded(size=32)
    chain_root: bytes = bounded(size=64)
    blocks: int = bounded(low=0, default=0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Resume:
    """What the client has already been sent: a worker continues after it and never repeats it."""

    emitted: tuple[int, ...] = bounded(size=PROMPT_TOKENS_MAX, default=())
    text_offset: int = bounded(low=0, default=0)


@dataclass(frozen=True, slots=True, kw_only=True)
class TailBlock:
    """The unfinished last block of a prompt: private to its request, freed at release."""

    key: BlockHash = bounded(size=32)
    length: int = bounded(low=1)


@dataclass(frozen=True, slots=True, kw_only=True)
class HandoverTicket:
    """All that a decode worker needs to continue: KV of the first `covered` tokens is stored under these names."""

    request_id: RequestId
    attempt: int
    source: WorkerId
    scopes: tuple[KvScope, ...] = bounded(size=4)
    hashes: tuple[BlockHash, ...] = bounded(size=65536)
    tail: TailBlock | None = None
    covered: int = bounded(low=0)
    emitted: tuple[int, ...] = bounded(size=PROMPT_TOKENS_MAX)
    text_offset: int = bounded(low=0, default=0)
    leases: tuple[LeaseId, ...] = bounded(size=64, default=())


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateRequest:
    """One generation, as the gateway sends it to a worker. `deadline_s` is what remains, so clocks need not agree."""

    request_id: RequestId = bounded(size=128)
    attempt: int = bounded(low=0, default=0)
    tenant: TenantId = bounded(size=128)
    model: str = bounded(size=256)
    scopes: tuple[KvScope, ...] = bounded(size=4)
    token_ids: tuple[int, ...] = bounded(size=PROMPT_TOKENS_MAX)
    sampling: Sampling
    grammar: str = bounded(size=65536, default="")
    stop: tuple[str, ...] = bounded(size=STOPS_MAX, default=())
    deadline_s: float = bounded(low=0, high=86400)
    program_id: ProgramId = bounded(size=128, default=ProgramId(""))
    call_id: CallId = bounded(size=128, default=CallId(""))
    priority: int = 0
    hints: Mapping[str, str] = bounded(size=32, default_factory=dict)
    resume: Resume | None = None
    ticket: HandoverTicket | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class TopLogprob:
    id: int
    token: bytes
    logprob: float


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenLogprob:
    """Log-probability of a chosen token and of its likeliest rivals; `token` is its exact bytes."""

    id: int
    token: bytes
    logprob: float
    top: tuple[TopLogprob, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """Counts of one request: `cached` were in the worker, `loaded` came from the kvstore, others were computed."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    loaded_tokens: int = 0
    blocks_moved: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Timings:
    """Where the time of one request went, in seconds. `kv_wait_s`, when nothing could be computed for want of loaded
    keys and values, is the part of `lookup_s` and `transfer_s` that computing did not overlap.
    """

    queue_s: float = 0.0
    lookup_s: float = 0.0
    transfer_s: float = 0.0
    prefill_s: float = 0.0
    decode_s: float = 0.0
    kv_wait_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Accepted:
    worker: WorkerId


@dataclass(frozen=True, slots=True, kw_only=True)
class Refused:
    """The worker has no room: nothing was started; try elsewhere or after `retry_after_ms`."""

    code: str
    message: str
    retry_after_ms: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """A sign of life: at least every 250 ms when no token comes."""

    stage: Stage
    done: int = 0
    total: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Tokens:
    """New tokens: `offset` counts generated tokens before `ids`, `text_offset` characters before `text`."""

    attempt: int
    offset: int
    ids: tuple[int, ...]
    text: str = ""
    text_offset: int = 0
    logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Handover:
    """Prefill is done and its blocks are stored: the stream goes on at a decode worker."""

    ticket: HandoverTicket
    first: Tokens
    usage: Usage
    timings: Timings


@dataclass(frozen=True, slots=True, kw_only=True)
class Finished:
    """The one good end of a request; `lease` names blocks kept under a one-second grace for `Retain`."""

    reason: FinishReason
    usage: Usage
    timings: Timings
    lease: LeaseId | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Failed:
    """The one bad end of a request."""

    code: str
    message: str
    field: str = ""
    retryable: bool = False


Event = Accepted | Refused | Progress | Tokens | Handover | Finished | Failed


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineInfo:
    """What a worker is: everything that routing, tokenizing and KV identity need to know."""

    worker: WorkerId
    role: Role
    model: str
    revision: str
    tokenizer_hash: str
    block_size: int
    block_bytes: int
    layers: int
    capacity_blocks: int
    context_limit: int
    layout_fingerprint: str
    precision: str
    kv_dtype: str
    features: tuple[str, ...] = ()
    protocol_min: int = 1
    protocol_max: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineLoad:
    """How busy a worker is now."""

    running: int = 0
    waiting: int = 0
    queued_tokens: int = 0
    free_blocks: int = 0
    total_blocks: int = 0
    pinned_blocks: int = 0
    cached_blocks: int = 0
    draining: bool = False
    lendable_blocks: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class CancelRequest:
    request_id: RequestId = bounded(size=128)


@dataclass(frozen=True, slots=True, kw_only=True)
class RetainRequest:
    """Keep the blocks under `lease` for `ttl_s` seconds, then drop or demote them."""

    lease: LeaseId = bounded(size=128)
    ttl_s: float = bounded(low=0, high=3600)
    then: Afterwards = Afterwards.DEMOTE
    program_id: ProgramId = bounded(size=128, default=ProgramId(""))


@dataclass(frozen=True, slots=True, kw_only=True)
class RetainReply:
    """How many blocks and bytes stay pinned, and for how long."""

    blocks: int
    size_bytes: int
    ttl_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportRequest:
    request_id: RequestId = bounded(size=128)


@dataclass(frozen=True, slots=True, kw_only=True)
class AdoptRequest:
    """Load the blocks that a ticket names into this worker ahead of the request."""

    tenant: TenantId = bounded(size=128)
    ticket: HandoverTicket


@dataclass(frozen=True, slots=True, kw_only=True)
class AdoptReply:
    blocks: int
