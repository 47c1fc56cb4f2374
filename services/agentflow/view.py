"""Runs as clients see them: views and events with their values put in."""

from __future__ import annotations

from dataclasses import replace

from covey.errors import PayloadTooLarge
from covey.policy.flow_event import Value
from covey.types.flow import FlowEvent, NodeState, NodeView, RunState, RunView
from covey.types.ids import TenantId
from services.agentflow.blob import Blobs
from services.agentflow.live import Entry, LiveRun

VIEW_BYTES_MAX = 3 * 1024**2
"""Texts in one view; a message holds 4 MiB."""
VIEW_VALUES_BYTES_MAX = 1024**2
"""Node values in one view: those beyond it are left to `watch`, whose events carry each one."""


async def event_of(entry: Entry, tenant: TenantId, blobs: Blobs) -> FlowEvent:
    """Return an event with its node's value."""
    if entry.value is None or entry.event.node is None:
        return entry.event
    node = replace(entry.event.node, value=await blobs.load(tenant, entry.value))
    return replace(entry.event, node=node)


async def view_of(live: LiveRun, blobs: Blobs) -> RunView:
    """Return a run with all nodes, the outputs it has, and node values as far as they fit.

    Raises:
        PayloadTooLarge: the outputs do not fit into a message.
    """
    outputs = await _outputs(live, blobs)
    left = VIEW_VALUES_BYTES_MAX
    nodes: list[NodeView] = []
    for node_id in live.state.graph.nodes:
        view, value = live.node_view(node_id), live.node(node_id).value
        if value is not None and not value.blob and value.size_bytes <= left:
            left -= value.size_bytes
            view = replace(view, value=value.text)
        nodes.append(view)
    return replace(summary_of(live), nodes=tuple(nodes), outputs=outputs)


def summary_of(live: LiveRun) -> RunView:
    """Return a run without nodes and outputs."""
    state = live.state
    return RunView(
        run_id=live.run_id,
        state=state.state if live.seq > 1 else RunState.PENDING,
        workflow=live.submit.workflow.name,
        seq=live.seq,
        created_s=state.created_s,
        ended_s=state.ended_s,
        error_code=state.code,
        error=state.message,
    )


async def _outputs(live: LiveRun, blobs: Blobs) -> dict[str, str]:
    values: dict[str, Value] = {}
    for name in live.state.graph.outputs:
        node = live.node(name)
        if node.state is NodeState.SUCCEEDED and node.value is not None:
            values[name] = node.value
    size_bytes = sum(value.size_bytes for value in values.values())
    if size_bytes > VIEW_BYTES_MAX:
        raise PayloadTooLarge(
            f"the outputs are {size_bytes} bytes, a view holds {VIEW_BYTES_MAX}: watch the run, its events carry each",
            field="outputs",
        )
    return {name: await blobs.load(live.tenant, value) for name, value in values.items()}
