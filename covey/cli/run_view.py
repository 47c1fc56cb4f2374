"""A run drawn live: its graph with states and timings; one line a change where there is no terminal."""

from __future__ import annotations

from contextlib import nullcontext

from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.table import Table

from covey.client.run import Run
from covey.clock import Clock
from covey.types.flow import NodeState, NodeView, RunState, RunView

MARKS = {
    NodeState.WAITING: "[dim]·[/]",
    NodeState.RUNNING: "[yellow]▶[/]",
    NodeState.SUCCEEDED: "[green]✓[/]",
    NodeState.FAILED: "[red]✗[/]",
    NodeState.CANCELLED: "[red]-[/]",
    NodeState.SKIPPED: "[dim]-[/]",
}


async def follow(run: Run, console: Console, clock: Clock) -> RunView:
    """Draw the run until it has ended, and return it whole."""
    view = await run.view()
    nodes = {node.id: node for node in view.nodes}
    depths = _depths(nodes)
    drawn = Live(console=console, refresh_per_second=8) if console.is_terminal else None
    with drawn or nullcontext():
        async with run.events() as events:
            async for event in events:
                if event.node is not None:
                    nodes[event.node.id] = event.node
                if drawn is not None:
                    drawn.update(_table(nodes, depths, clock.wall()))
                elif event.node is not None:
                    console.print(_line(event.node, clock.wall()), highlight=False)
                if event.run_state in {RunState.SUCCEEDED, RunState.FAILED, RunState.CANCELLED}:
                    break
    return await run.view()


def _depths(nodes: dict[str, NodeView]) -> dict[str, int]:
    """Distance of each node from those that need nothing."""
    depths: dict[str, int] = {}

    def depth(name: str) -> int:
        if name not in depths:
            needed = [n for n in nodes[name].depends_on if n in nodes]
            depths[name] = 1 + max((depth(n) for n in needed), default=-1)
        return depths[name]

    for name in nodes:
        depth(name)
    return depths


def _table(nodes: dict[str, NodeView], depths: dict[str, int], now: float) -> Table:
    table = Table.grid(padding=(0, 2))
    for node in sorted(nodes.values(), key=lambda n: depths[n.id]):
        indent = "  " * depths[node.id]
        table.add_row(f"{indent}{MARKS[node.state]} {node.id}", node.kind, _elapsed(node, now), _notes(node))
    return table


def _line(node: NodeView, now: float) -> str:
    return f"{MARKS[node.state]} {node.id:<16} {node.kind:<5} {_elapsed(node, now):>7}  {_notes(node)}"


def _elapsed(node: NodeView, now: float) -> str:
    if not node.started_s:
        return ""
    return f"{(node.ended_s or now) - node.started_s:.1f} s"


def _notes(node: NodeView) -> str:
    notes = []
    if node.usage is not None and node.usage.completion_tokens:
        notes.append(f"{node.usage.prompt_tokens} → {node.usage.completion_tokens} tokens")
        if hits := node.usage.cached_tokens + node.usage.loaded_tokens:
            notes.append(f"{hits} from cache")
    if node.pinned_blocks:
        notes.append(f"{node.pinned_blocks} blocks pinned")
    if node.state is NodeState.SUCCEEDED and node.kind == "llm" and node.cache in {"EXACT", "SEMANTIC"}:
        notes.append(f"semcache: {node.cache.value.lower()}")
    if node.error:
        notes.append(f"[red]{node.error_code}: {escape(node.error)}[/]")
    return ", ".join(notes)
