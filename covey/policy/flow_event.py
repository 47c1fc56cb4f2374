"""What happens to a run: the events that its journal holds and that its state is made of. Times are Unix seconds."""

from __future__ import annotations

from dataclasses import dataclass

from covey.types.flow import RunState
from covey.types.generate import Timings, Usage
from covey.types.program import CacheOutcome


@dataclass(frozen=True, slots=True, kw_only=True)
class Value:
    """A text: itself, or the name of the blob that holds it."""

    size_bytes: int
    text: str = ""
    blob: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeStarted:
    """The node's work is about to be handed out for the `submission`-th time, counted from 1."""

    node: str
    at_s: float
    submission: int


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeRetried:
    """An attempt failed; the next one starts at `resume_at_s`."""

    node: str
    at_s: float
    resume_at_s: float
    code: str
    message: str


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeSucceeded:
    node: str
    at_s: float
    value: Value
    usage: Usage | None = None
    timings: Timings | None = None
    cache: CacheOutcome = CacheOutcome.OFF
    worker: str = ""
    pinned_blocks: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeFailed:
    """The node failed for good, and with it the run."""

    node: str
    at_s: float
    code: str
    message: str


@dataclass(frozen=True, slots=True, kw_only=True)
class CancelRequested:
    at_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class RunEnded:
    """Nothing of the run is at work any more."""

    at_s: float
    state: RunState
    code: str = ""
    message: str = ""


FlowChange = NodeStarted | NodeRetried | NodeSucceeded | NodeFailed | CancelRequested | RunEnded
