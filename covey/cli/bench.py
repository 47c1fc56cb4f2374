"""`covey bench NAME`: measure the mesh; a table, plots, and one JSON object."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import anyio
import click
from rich.console import Console

from covey.cli.files import MeshFiles
from covey.cli.mesh import MeshPlan
from covey.cli.models import parse_models
from covey.cli.state import ready_home


@click.group()
def bench() -> None:
    """Measure the mesh on this machine."""


@bench.command()
@click.option("--peers", is_flag=True, help="Measure those that `make peers` has set up, too.")
@click.option("--quick", is_flag=True, help="End within five minutes.")
@click.option("--data", type=click.Path(exists=True, file_okay=False, path_type=Path), help="Public data; $COVEY_DATA.")
@click.option("--json", "target", help="Write the result here; - for standard output.")
@click.option("--plots", type=click.Path(file_okay=False, path_type=Path), default=Path(".bench"), show_default=True)
@click.option("--model", "models", multiple=True, help="As in `covey up`.")
def serve(
    peers: bool, quick: bool, data: Path | None, target: str | None, plots: Path, models: tuple[str, ...]
) -> None:
    """A whole mesh under an open loop of chat requests."""
    from benchmarks import serve as benchmark

    data = data or (Path(os.environ["COVEY_DATA"]) if os.environ.get("COVEY_DATA") else None)
    console = Console(stderr=target == "-")
    local, remotes = parse_models(models)
    with tempfile.TemporaryDirectory(prefix="covey-bench-") as run_dir:
        files = MeshFiles(run_dir=Path(run_dir), cache_dir=ready_home() / "cache")
        plan = MeshPlan(files=files, models=local, remotes=remotes)
        report = anyio.run(lambda: benchmark.run(plan, console, quick=quick, peers=peers, data=data, plots=plots))
    if target != "-":
        report.print(console)
        console.print(f"plots: {plots / 'serve.png'}")
    report.write(target)
