"""One request as the gateway works on it, whichever edge it came through."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from covey.types.generate import FinishReason, Timings, Usage
from covey.types.ids import CallId, ProgramId, RequestId, TenantId, WorkerId
from covey.types.program import CacheMode, CacheOutcome, CallParams, FunctionTool, Message, ToolHint, Tooling

SEQUENCES_MAX = 128
"""Prompts times `n` of one request."""
COMPLETION_TOKENS_DEFAULT = 16
"""What a plain completion without `max_tokens` gets, as at OpenAI; a chat gets all that the context leaves."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """What to continue: a conversation, a text, or tokens; exactly one of them."""

    messages: tuple[Message, ...] = ()
    tools: tuple[FunctionTool, ...] = ()
    """What the model is told that it may call; with `messages` only."""
    text: str | None = None
    ids: tuple[int, ...] | None = None

    @property
    def field(self) -> str:
        """What the caller calls it."""
        return "messages" if self.messages else "prompt"


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A validated request of an authenticated tenant. `deadline_at` is on the gateway's clock."""

    request_id: RequestId
    tenant: TenantId
    model: str
    prompts: tuple[Prompt, ...]
    params: CallParams
    cache: CacheMode
    deadline_at: float
    max_age_s: float = 0.0
    """The oldest kept answer that will do; 0 is no limit of the request's own."""
    priority: int = 0
    program_id: ProgramId = ProgramId("")
    call_id: CallId = CallId("")
    tooling: Tooling | None = None
    """The functions that the caller offers, unless none may be called."""
    then_tool: ToolHint | None = None
    sticky: WorkerId = WorkerId("")
    """The decode worker that holds the program's prefix."""
    hints: Mapping[str, str] = field(default_factory=dict)
    shown: tuple[str, ...] = ()
    """Entries of semcache that the last turn shows as examples."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How one sequence ended."""

    reason: FinishReason
    usage: Usage
    timings: Timings
    cache: CacheOutcome = CacheOutcome.OFF
    split: bool = False
    migrations: int = 0
    worker: WorkerId = WorkerId("")
    pinned_blocks: int = 0
    text: str = ""


def add_timings(a: Timings, b: Timings) -> Timings:
    return Timings(
        queue_s=a.queue_s + b.queue_s,
        lookup_s=a.lookup_s + b.lookup_s,
        transfer_s=a.transfer_s + b.transfer_s,
        prefill_s=a.prefill_s + b.prefill_s,
        decode_s=a.decode_s + b.decode_s,
        kv_wait_s=a.kv_wait_s + b.kv_wait_s,
    )
