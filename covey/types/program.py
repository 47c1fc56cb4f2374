"""Programs at the gateway: chat and completion calls, and graphs of calls over semantic variables."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

from covey.types.generate import FinishReason, Timings, TokenLogprob, Usage
from covey.types.ids import CallId, ProgramId, RequestId
from covey.types.limits import bounded

TEXT_CHARS_MAX = 4_194_304
CALLS_MAX = 10_000


class CacheMode(StrEnum):
    """`USE` reads and fills semcache; `BYPASS` does neither; `NO_STORE` only reads; `REFRESH` only fills."""

    USE = "USE"
    BYPASS = "BYPASS"
    NO_STORE = "NO_STORE"
    REFRESH = "REFRESH"


class CacheOutcome(StrEnum):
    """What semcache did for a request."""

    BYPASS = "BYPASS"
    OFF = "OFF"
    MISS = "MISS"
    EXACT = "EXACT"
    SEMANTIC = "SEMANTIC"


class ObjectiveKind(StrEnum):
    LATENCY = "LATENCY"
    THROUGHPUT = "THROUGHPUT"
    TTFT = "TTFT"
    TPOT = "TPOT"
    DEADLINE = "DEADLINE"


class ToolChoice(StrEnum):
    """`AUTO` leaves it to the model, `REQUIRED` makes it call some function, `NAMED` the one that is named."""

    AUTO = "AUTO"
    NONE = "NONE"
    REQUIRED = "REQUIRED"
    NAMED = "NAMED"


@dataclass(frozen=True, slots=True, kw_only=True)
class FunctionCall:
    """A function that the model asks the caller to run; `arguments` is a JSON text."""

    id: str = bounded(size=256)
    name: str = bounded(size=64)
    arguments: str = bounded(size=TEXT_CHARS_MAX)


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """One turn; in a semantic call `content` is a template that may name `{{variables}}`.

    An assistant's turn may consist of calls; a `tool` turn answers the call of `tool_call_id`.
    """

    role: str = bounded(size=16)
    content: str = bounded(size=TEXT_CHARS_MAX)
    tool_calls: tuple[FunctionCall, ...] = bounded(size=128, default=())
    tool_call_id: str = bounded(size=256, default="")


@dataclass(frozen=True, slots=True, kw_only=True)
class FunctionTool:
    """A function that the model may ask for; `parameters` is the JSON schema of its arguments, as a text."""

    name: str = bounded(size=64)
    description: str = bounded(size=16_384, default="")
    parameters: str = bounded(size=65_536, default="")


@dataclass(frozen=True, slots=True, kw_only=True)
class Tooling:
    """The functions of a conversation and which of them must be called; `name` belongs to `NAMED`."""

    tools: tuple[FunctionTool, ...] = bounded(size=128)
    choice: ToolChoice = ToolChoice.AUTO
    name: str = bounded(size=64, default="")
    parallel: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class CallParams:
    """Sampling as a client states it: everything optional; the gateway fills in the rest."""

    max_tokens: int | None = bounded(low=1, default=None)
    temperature: float | None = bounded(low=0, high=2, default=None)
    top_p: float | None = bounded(low=0, high=1, default=None)
    top_k: int | None = bounded(low=0, default=None)
    min_p: float | None = bounded(low=0, high=1, default=None)
    seed: int | None = bounded(low=0, high=2**63 - 1, default=None)
    presence_penalty: float | None = bounded(low=-2, high=2, default=None)
    frequency_penalty: float | None = bounded(low=-2, high=2, default=None)
    repetition_penalty: float | None = bounded(low=0.01, high=100, default=None)
    logit_bias: Mapping[int, float] = bounded(size=1024, default_factory=dict)
    logprobs: int | None = bounded(low=0, high=20, default=None)
    min_tokens: int | None = bounded(low=0, default=None)
    ignore_eos: bool = False
    stop: tuple[str, ...] = bounded(size=16, default=())
    n: int = bounded(low=1, high=128, default=1)
    grammar: str = bounded(size=65536, default="")
    """What the answer must look like; see `covey.types.grammar`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatRequest:
    model: str = bounded(size=256)
    messages: tuple[Message, ...] = bounded(size=4096)
    params: CallParams
    cache: CacheMode = CacheMode.USE
    deadline_s: float = bounded(low=0, high=86400, default=0.0)
    tooling: Tooling | None = None
    cache_max_age_s: float = bounded(low=0, default=0.0)
    """The oldest kept answer that will do; 0 is no limit of the request's own."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CompleteRequest:
    model: str = bounded(size=256)
    prompt: str = bounded(size=TEXT_CHARS_MAX)
    params: CallParams
    cache: CacheMode = CacheMode.USE
    deadline_s: float = bounded(low=0, high=86400, default=0.0)
    cache_max_age_s: float = bounded(low=0, default=0.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Started:
    """The request was admitted."""

    request_id: RequestId
    model: str


@dataclass(frozen=True, slots=True, kw_only=True)
class CallDelta:
    """More of the `index`-th call of a choice: its first delta carries id and name, all carry more `arguments`."""

    index: int
    id: str = ""
    name: str = ""
    arguments: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Delta:
    """New text of choice `index`; `ids` are its tokens."""

    index: int
    text: str
    ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    calls: tuple[CallDelta, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class ChoiceDone:
    index: int
    reason: FinishReason


@dataclass(frozen=True, slots=True, kw_only=True)
class Completed:
    """The end of a request: its cost and where the time went."""

    usage: Usage
    timings: Timings
    cache: CacheOutcome
    split: bool = False
    migrations: int = 0


CompletionEvent = Started | Delta | ChoiceDone | Completed


@dataclass(frozen=True, slots=True, kw_only=True)
class EmbedRequest:
    model: str = bounded(size=256)
    inputs: tuple[str, ...] = bounded(size=2048)


@dataclass(frozen=True, slots=True, kw_only=True)
class Vector:
    values: tuple[float, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class EmbedReply:
    vectors: tuple[Vector, ...]
    prompt_tokens: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelCard:
    """A model of this mesh: served here, or `remote` at an OpenAI-compatible URL."""

    id: str
    context_limit: int
    ready_workers: int
    remote: bool = False
    embedding: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelList:
    models: tuple[ModelCard, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Objective:
    """What an output is wanted for; `target_s` belongs to TTFT, TPOT and DEADLINE."""

    kind: ObjectiveKind = ObjectiveKind.LATENCY
    target_s: float = bounded(low=0, default=0.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolHint:
    """A tool call follows this call: how long its tool is expected to run, for the pin policy."""

    tool: str = bounded(size=128)
    expected_s: float = bounded(low=0, default=0.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class SemanticCall:
    """A prompt template over semantic variables; it runs when its inputs exist and sets `output`."""

    call_id: CallId = bounded(size=128)
    messages: tuple[Message, ...] = bounded(size=4096)
    output: str = bounded(size=128)
    model: str = bounded(size=256, default="")
    params: CallParams
    cache: CacheMode = CacheMode.USE
    then_tool: ToolHint | None = None
    timeout_s: float = bounded(low=0, high=86400, default=0.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenProgram:
    """Open a program; the same `idempotency_key` of one tenant opens the same program."""

    idempotency_key: str = bounded(size=128, default="")
    deadline_s: float = bounded(low=0, high=86400, default=0.0)
    ttl_s: float = bounded(low=1, high=86400, default=3600.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class ProgramHandle:
    program_id: ProgramId
    existing: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class SubmitCalls:
    """Add calls and ready values to a program; a call id that is known with the same body is not run again."""

    program_id: ProgramId = bounded(size=128)
    calls: tuple[SemanticCall, ...] = bounded(size=CALLS_MAX)
    variables: Mapping[str, str] = bounded(size=CALLS_MAX, default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class SubmitReply:
    accepted: tuple[CallId, ...]
    known: tuple[CallId, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class SetVariable:
    program_id: ProgramId = bounded(size=128)
    name: str = bounded(size=128)
    value: str = bounded(size=TEXT_CHARS_MAX)


@dataclass(frozen=True, slots=True, kw_only=True)
class GetVariable:
    """Wait for a value. The objective travels with `get`, not with `submit` (Parrot §1.2)."""

    program_id: ProgramId = bounded(size=128)
    name: str = bounded(size=128)
    objective: Objective
    timeout_s: float = bounded(low=0, high=86400)


@dataclass(frozen=True, slots=True, kw_only=True)
class VariableValue:
    """A value and how it came about; `pinned_blocks` stay with `worker` for the tool call that follows."""

    name: str
    value: str
    call_id: CallId = CallId("")
    reason: FinishReason | None = None
    usage: Usage | None = None
    timings: Timings | None = None
    cache: CacheOutcome = CacheOutcome.OFF
    worker: str = ""
    pinned_blocks: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class VariableDelta:
    name: str
    text: str


VariableEvent = VariableDelta | VariableValue


@dataclass(frozen=True, slots=True, kw_only=True)
class AckValues:
    """The journal holds these values: the gateway may forget them."""

    program_id: ProgramId = bounded(size=128)
    names: tuple[str, ...] = bounded(size=CALLS_MAX)


@dataclass(frozen=True, slots=True, kw_only=True)
class ProgramRequest:
    program_id: ProgramId = bounded(size=128)


@dataclass(frozen=True, slots=True, kw_only=True)
class CancelCalls:
    """Cancel some calls of a program, or all of it when `calls` is empty; returns when decoding has stopped."""

    program_id: ProgramId = bounded(size=128)
    calls: tuple[CallId, ...] = bounded(size=CALLS_MAX, default=())
