"""`covey demo`: a real mesh, a streamed answer, a workflow with tools over real documents, twice, and what it cost."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import anyio
import click
import httpx
from rich.console import Console
from rich.table import Table

from covey.cli.chat import delta_text, stream_chat
from covey.cli.demo_workflow import read_documentation, reading
from covey.cli.files import MeshFiles
from covey.cli.mesh import Mesh, MeshPlan, running
from covey.cli.models import parse_models
from covey.cli.run_view import follow
from covey.cli.state import http_client, ready_home
from covey.cli.up import Progress, publish
from covey.client.client import Client
from covey.clock import Clock, MonotonicClock
from covey.errors import FailedPrecondition
from covey.types.flow import NodeView, RunState, RunView

QUESTION = "What is a covey of partridges? Answer in two sentences."
CHAT_TOKENS = 64
HITS = ("EXACT", "SEMANTIC")


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """What one part of the demo took."""

    seconds: float
    ttft_s: float
    prompt_tokens: int = 0
    output_tokens: int = 0
    blocks_moved: int = 0
    prefix_tokens: int = 0
    pinned_blocks: int = 0
    cache_hits: int = 0


@click.command()
@click.option("--model", "models", multiple=True, help="As in `covey up`.")
def demo(models: tuple[str, ...]) -> None:
    """Exit code 0 only if every step ended well."""
    local, remotes = parse_models(models)
    with tempfile.TemporaryDirectory(prefix="covey-demo-") as run_dir:
        files = MeshFiles(run_dir=Path(run_dir), cache_dir=ready_home() / "cache")
        anyio.run(_demo, MeshPlan(files=files, models=local, remotes=remotes))


async def _demo(plan: MeshPlan) -> None:
    console, clock = Console(), MonotonicClock()
    console.rule("[bold]six services, one model[/]")
    async with running(plan, report=Progress(console, as_json=False)) as mesh:
        endpoints = publish(mesh)
        console.rule("[bold]a streamed answer[/]")
        console.print(f"[cyan]> {QUESTION}[/]")
        async with http_client(endpoints) as client:
            chat = await _chat(client, endpoints.models[0], console, clock)
        runs = [await _workflow(mesh, console, clock, nth) for nth in ("first", "second")]
    console.rule("[bold]what it cost[/]")
    console.print(_table(chat, *runs))
    console.print("[green]Every step ended well.[/]")


async def _chat(client: httpx.AsyncClient, model: str, console: Console, clock: Clock) -> Cost:
    body = {
        "model": model,
        "messages": [{"role": "user", "content": QUESTION}],
        "max_tokens": CHAT_TOKENS,
        "temperature": 0,
    }
    began, first, last = clock.now(), 0.0, {}
    async for chunk in stream_chat(client, body):
        text = delta_text(chunk)
        if text and not first:
            first = clock.now() - began
        console.print(text, end="", markup=False, highlight=False, soft_wrap=True)
        last = chunk
    console.print()
    usage, extra = last["usage"], last["covey"]
    return Cost(
        seconds=clock.now() - began,
        ttft_s=first,
        prompt_tokens=usage["prompt_tokens"],
        output_tokens=usage["completion_tokens"],
        blocks_moved=extra["blocks_moved"],
        prefix_tokens=extra["cached_tokens"] + extra["loaded_tokens"],
        cache_hits=int(extra["cache"].upper() in HITS),
    )


async def _workflow(mesh: Mesh, console: Console, clock: Clock, nth: str) -> Cost:
    """Run the workflow and draw it.

    Raises:
        FailedPrecondition: it did not succeed.
    """
    console.rule(f"[bold]the workflow, {nth} run[/]")
    run_dir = mesh.plan.files.run_dir
    async with Client.connect(run_dir=run_dir) as client, client.serve_tools([read_documentation]):
        began = clock.now()
        run = await client.submit(reading())
        view = await follow(run, console, clock)
        seconds = clock.now() - began
    if view.state is not RunState.SUCCEEDED:
        raise FailedPrecondition(f"the workflow's {nth} run {view.state.value.lower()}: {view.error}")
    console.print("answer:", style="cyan", end=" ")
    console.print(view.outputs["answer"], markup=False, highlight=False)
    return _cost(view, seconds)


def _cost(view: RunView, seconds: float) -> Cost:
    calls = [node for node in view.nodes if node.kind == "llm"]
    used = [node.usage for node in calls if node.usage is not None]
    first = [_first_token_s(node) for node in calls]
    return Cost(
        seconds=seconds,
        ttft_s=sum(first) / len(first),
        prompt_tokens=sum(u.prompt_tokens for u in used),
        output_tokens=sum(u.completion_tokens for u in used),
        blocks_moved=sum(u.blocks_moved for u in used),
        prefix_tokens=sum(u.cached_tokens + u.loaded_tokens for u in used),
        pinned_blocks=sum(node.pinned_blocks for node in calls),
        cache_hits=sum(node.cache.value in HITS for node in calls),
    )


def _first_token_s(node: NodeView) -> float:
    timings = node.timings
    if timings is None:
        return 0.0
    return timings.queue_s + timings.lookup_s + timings.transfer_s + timings.prefill_s


def _table(*costs: Cost) -> Table:
    table = Table("", "chat", "first run", "second run")
    rows: tuple[tuple[str, Iterable[str]], ...] = (
        ("seconds", (f"{c.seconds:.1f}" for c in costs)),
        ("time to first token, mean (s)", (f"{c.ttft_s:.2f}" for c in costs)),
        ("prompt tokens", (str(c.prompt_tokens) for c in costs)),
        ("output tokens", (str(c.output_tokens) for c in costs)),
        ("blocks moved", (str(c.blocks_moved) for c in costs)),
        ("prompt tokens from a prefix cache", (str(c.prefix_tokens) for c in costs)),
        ("blocks pinned during tools", (str(c.pinned_blocks) for c in costs)),
        ("answers from semcache", (str(c.cache_hits) for c in costs)),
    )
    for name, values in rows:
        table.add_row(name, *values)
    return table
