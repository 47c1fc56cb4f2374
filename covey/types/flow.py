"""Workflows at agentflow: nodes, runs, events, and the tool workers that attach to them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

from covey.types.generate import Timings, Usage
from covey.types.ids import RunId
from covey.types.limits import bounded
from covey.types.program import TEXT_CHARS_MAX, CacheMode, CacheOutcome, CallParams, Message

NODES_MAX = 10_000


class RunState(StrEnum):
    PENDING = "PENDING"
    RUNNING = "RUNNING"
    SUCCEEDED = "SUCCEEDED"
    FAILED = "FAILED"
    CANCELLED = "CANCELLED"


class NodeState(StrEnum):
    WAITING = "WAITING"
    RUNNING = "RUNNING"
    SUCCEEDED = "SUCCEEDED"
    FAILED = "FAILED"
    CANCELLED = "CANCELLED"
    SKIPPED = "SKIPPED"


@dataclass(frozen=True, slots=True, kw_only=True)
class RetryPolicy:
    """At most `attempts` in all, with full-jitter back-off from `base_s` up to `ceiling_s`."""

    attempts: int = bounded(low=1, high=100, default=3)
    base_s: float = bounded(low=0, high=3600, default=0.2)
    ceiling_s: float = bounded(low=0, high=3600, default=10.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class LlmNode:
    """A semantic call: templates name `{{inputs}}` and `{{other_nodes}}`."""

    messages: tuple[Message, ...] = bounded(size=4096)
    model: str = bounded(size=256, default="")
    params: CallParams
    cache: CacheMode = CacheMode.USE


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolNode:
    """A call of an attached tool; argument values are templates."""

    tool: str = bounded(size=128)
    arguments: Mapping[str, str] = bounded(size=64, default_factory=dict)
    expected_s: float = bounded(low=0, default=0.0)


NodeKind = LlmNode | ToolNode


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """A step of a workflow; `id` is also the name of its value. `after` orders without passing a value."""

    id: str = bounded(size=128)
    work: NodeKind
    after: tuple[str, ...] = bounded(size=1024, default=())
    timeout_s: float = bounded(low=0, high=86400, default=0.0)
    retry: RetryPolicy | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Workflow:
    name: str = bounded(size=128)
    version: str = bounded(size=64, default="1")
    nodes: tuple[Node, ...] = bounded(size=NODES_MAX)
    outputs: tuple[str, ...] = bounded(size=NODES_MAX, default=())


@dataclass(frozen=True, slots=True, kw_only=True)
class SubmitRun:
    """Start a run; one `idempotency_key` with one body is one run, another body is ALREADY_EXISTS."""

    idempotency_key: str = bounded(size=128, default="")
    workflow: Workflow
    inputs: Mapping[str, str] = bounded(size=NODES_MAX, default_factory=dict)
    deadline_s: float = bounded(low=0, high=86400, default=0.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class RunHandle:
    run_id: RunId
    existing: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeView:
    id: str
    state: NodeState
    attempts: int = 0
    started_s: float = 0.0
    ended_s: float = 0.0
    value: str = ""
    error_code: str = ""
    error: str = ""
    usage: Usage | None = None
    timings: Timings | None = None
    cache: CacheOutcome = CacheOutcome.OFF
    depends_on: tuple[str, ...] = ()
    kind: str = ""
    worker: str = ""
    pinned_blocks: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class RunView:
    """A run as journaled; times are unix seconds."""

    run_id: RunId
    state: RunState
    workflow: str
    seq: int
    created_s: float
    ended_s: float = 0.0
    nodes: tuple[NodeView, ...] = ()
    outputs: Mapping[str, str] = bounded(default_factory=dict)
    error_code: str = ""
    error: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunRequest:
    run_id: RunId = bounded(size=128)


@dataclass(frozen=True, slots=True, kw_only=True)
class ListRuns:
    state: RunState | None = None
    limit: int = bounded(low=1, high=1000, default=100)


@dataclass(frozen=True, slots=True, kw_only=True)
class RunList:
    runs: tuple[RunView, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class WaitRun:
    run_id: RunId = bounded(size=128)
    timeout_s: float = bounded(low=0, high=86400)


@dataclass(frozen=True, slots=True, kw_only=True)
class WatchRun:
    """Events with a sequence id above `after_seq`: resumable without loss or repeat."""

    run_id: RunId = bounded(size=128)
    after_seq: int = bounded(low=0, default=0)


@dataclass(frozen=True, slots=True, kw_only=True)
class FlowEvent:
    """A journaled change of a run or of one node (`node` set)."""

    run_id: RunId
    seq: int
    at_s: float
    run_state: RunState
    node: NodeView | None = None
    error_code: str = ""
    error: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class SignalRun:
    run_id: RunId = bounded(size=128)
    name: str = bounded(size=128)
    value: str = bounded(size=65536, default="")
    signal_id: str = bounded(size=128)


@dataclass(frozen=True, slots=True, kw_only=True)
class ApproveRun:
    run_id: RunId = bounded(size=128)
    node: str = bounded(size=128)
    approved: bool
    reason: str = bounded(size=4096, default="")


@dataclass(frozen=True, slots=True, kw_only=True)
class ForkRun:
    run_id: RunId = bounded(size=128)
    from_node: str = bounded(size=128)


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolSpec:
    """A tool as its worker declares it; `parameters` is a JSON schema."""

    name: str = bounded(size=128)
    description: str = bounded(size=4096, default="")
    parameters: str = bounded(size=65536, default="{}")
    concurrency: int = bounded(low=1, high=1024, default=4)
    idempotent: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolHello:
    """First message of a tool worker: who it is and what it can run."""

    worker: str = bounded(size=128)
    tools: tuple[ToolSpec, ...] = bounded(size=256)


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolResult:
    """The end of a tool call: a value, or an error by class."""

    key: str = bounded(size=256)
    value: str = bounded(size=TEXT_CHARS_MAX, default="")
    error: str = bounded(size=4096, default="")
    retryable: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolBeat:
    """The tool worker is alive."""


ToolWorkerMessage = ToolHello | ToolResult | ToolBeat


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolAttached:
    """The tools are registered: calls may come."""

    beat_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolCall:
    """Run a tool. `key` is stable over retries and restarts: the side effect's idempotency key."""

    key: str
    run_id: RunId
    node: str
    tool: str
    arguments: Mapping[str, str] = bounded(size=64, default_factory=dict)
    timeout_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolCancel:
    key: str


ToolServerMessage = ToolAttached | ToolCall | ToolCancel
