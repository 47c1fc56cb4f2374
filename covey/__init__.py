"""Covey serves language models to agents: programs, disaggregated inference, caches.

The public API is the SDK: `Client`, semantic functions, workflows and tools. Names are loaded when they are used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from covey.client.client import Client
    from covey.client.program import Program
    from covey.client.run import Run, RunFailed
    from covey.client.semantic import SemanticFunction, semantic
    from covey.client.tool import Tool, tool
    from covey.client.variable import TextStream, Variable, deadline, latency, throughput, tpot, ttft
    from covey.client.workflow import Ref, Refs, Workflow
    from covey.errors import CoveyError
    from covey.types.flow import FlowEvent, NodeView, RetryPolicy, RunState, RunView, ToolCall
    from covey.types.program import CacheMode, Message, Objective

__version__: Final = "0.1.0"

_PLACES: Final = {
    "covey.client.client": ("Client",),
    "covey.client.program": ("Program",),
    "covey.client.run": ("Run", "RunFailed"),
    "covey.client.semantic": ("SemanticFunction", "semantic"),
    "covey.client.tool": ("Tool", "tool"),
    "covey.client.variable": ("TextStream", "Variable", "deadline", "latency", "throughput", "tpot", "ttft"),
    "covey.client.workflow": ("Ref", "Refs", "Workflow"),
    "covey.errors": ("CoveyError",),
    "covey.types.flow": ("FlowEvent", "NodeView", "RetryPolicy", "RunState", "RunView", "ToolCall"),
    "covey.types.program": ("CacheMode", "Message", "Objective"),
}
_MODULES: Final = {name: module for module, names in _PLACES.items() for name in names}

__all__ = [
    "CacheMode",
    "Client",
    "CoveyError",
    "FlowEvent",
    "Message",
    "NodeView",
    "Objective",
    "Program",
    "Ref",
    "Refs",
    "RetryPolicy",
    "Run",
    "RunFailed",
    "RunState",
    "RunView",
    "SemanticFunction",
    "TextStream",
    "Tool",
    "ToolCall",
    "Variable",
    "Workflow",
    "__version__",
    "deadline",
    "latency",
    "semantic",
    "throughput",
    "tool",
    "tpot",
    "ttft",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'covey' has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return __all__
