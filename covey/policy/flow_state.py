"""What a run's state consists of, and what it asks for next."""

from __future__ import annotations

from dataclasses import dataclass

from covey.policy.flow_event import Value
from covey.types.flow import NodeState, RetryPolicy, RunState
from covey.types.generate import Timings, Usage
from covey.types.program import CacheOutcome


@dataclass(frozen=True, slots=True, kw_only=True)
class FlowLimits:
    """Bounds for what a workflow leaves open, in seconds."""

    llm_timeout_s: float = 600.0
    tool_timeout_s: float = 60.0
    run_timeout_s: float = 86_400.0
    retry: RetryPolicy = RetryPolicy()


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeRun:
    """One node's state; `eligible_s` is when the last node that it needs succeeded, where its timeout starts."""

    state: NodeState = NodeState.WAITING
    submissions: int = 0
    failures: int = 0
    resume_at_s: float = 0.0
    eligible_s: float = 0.0
    started_s: float = 0.0
    ended_s: float = 0.0
    value: Value | None = None
    code: str = ""
    message: str = ""
    usage: Usage | None = None
    timings: Timings | None = None
    cache: CacheOutcome = CacheOutcome.OFF
    worker: str = ""
    pinned_blocks: int = 0

    @property
    def attempts(self) -> int:
        """Attempts so far, the one at work included."""
        return self.failures + (self.state in (NodeState.RUNNING, NodeState.SUCCEEDED, NodeState.CANCELLED))


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """Hand this node's work out, for the `submission`-th time, after journaling `NodeStarted`."""

    node: str
    submission: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Expire:
    """This node's time ran out: stop it, and journal what `judge` says."""

    node: str


@dataclass(frozen=True, slots=True, kw_only=True)
class End:
    """Stop everything at work, then journal `RunEnded`."""

    state: RunState
    code: str = ""
    message: str = ""


Effect = Start | Expire | End
