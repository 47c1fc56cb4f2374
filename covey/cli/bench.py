"""`covey bench NAME`: measure the mesh; a table, plots, and one JSON object."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import anyio
import click
from rich.console import Console

from covey.cli.files import MeshFiles
from covey.cli.mesh import MeshPlan
from covey.cli.models import DEFAULT, parse_models
from covey.cli.state import ready_home

if TYPE_CHECKING:
    from benchmarks.report import Report


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

    console = Console(stderr=target == "-")
    local, remotes = parse_models(models)
    given = data or _data()
    with tempfile.TemporaryDirectory(prefix="covey-bench-") as run_dir:
        files = MeshFiles(run_dir=Path(run_dir), cache_dir=ready_home() / "cache")
        plan = MeshPlan(files=files, models=local, remotes=remotes)
        report = anyio.run(lambda: benchmark.run(plan, console, quick=quick, peers=peers, data=given, plots=plots))
    _publish(report, console, target, plots / "serve.png")


@bench.command()
@click.option("--peers", is_flag=True, help="Measure those that `make peers` has set up, too.")
@click.option("--quick", is_flag=True, help="End within five minutes.")
@click.option("--data", type=click.Path(exists=True, file_okay=False, path_type=Path), help="Public data; $COVEY_DATA.")
@click.option("--json", "target", help="Write the result here; - for standard output.")
@click.option("--plots", type=click.Path(file_okay=False, path_type=Path), default=Path(".bench"), show_default=True)
@click.option("--model", default=DEFAULT, show_default=True, help="A packaged name, a folder, or a .gguf file.")
@click.option("--isa", type=click.Choice(["avx2"]), help="Hold every system to this instruction set.")
def engine(
    peers: bool, quick: bool, data: Path | None, target: str | None, plots: Path, model: str, isa: str | None
) -> None:
    """Prefill and decode of the engine's runner, beside its peers and what the machine can do."""
    from benchmarks import engine as benchmark

    console = Console(stderr=target == "-")
    with tempfile.TemporaryDirectory(prefix="covey-bench-") as run_dir:
        report = benchmark.run(
            model,
            ready_home() / "cache",
            Path(run_dir),
            console,
            quick=quick,
            with_peers=peers,
            data=data or _data(),
            plots=plots,
            isa=isa,
        )
    _publish(report, console, target, plots / "engine.png")


@bench.command()
@click.option("--peers", is_flag=True, help="Measure those that `make peers` has set up, too.")
@click.option("--quick", is_flag=True, help="End within five minutes.")
@click.option("--json", "target", help="Write the result here; - for standard output.")
@click.option("--plots", type=click.Path(file_okay=False, path_type=Path), default=Path(".bench"), show_default=True)
@click.option("--codecs", is_flag=True, help="Also what each codec of blocks costs in memory, time and quality.")
@click.option("--data", type=click.Path(exists=True, file_okay=False, path_type=Path), help="Public data; $COVEY_DATA.")
@click.option("--model", default=DEFAULT, show_default=True, help="Whose blocks the codecs encode.")
@click.option("--break-even", "crossing", is_flag=True, help="Also loading stored blocks against prefilling again.")
def kv(
    peers: bool,
    quick: bool,
    target: str | None,
    plots: Path,
    codecs: bool,
    data: Path | None,
    model: str,
    crossing: bool,
) -> None:
    """The KV store: puts, gets and look-ups by every transport, beside other stores and bare memory."""
    from benchmarks import kv as benchmark

    console = Console(stderr=target == "-")
    with tempfile.TemporaryDirectory(prefix="covey-bench-") as run_dir:
        report = benchmark.run(Path(run_dir), console, quick=quick, with_peers=peers, plots=plots)
    if codecs:
        from benchmarks import kv_codecs

        report.rows += kv_codecs.run(model, ready_home() / "cache", console, quick=quick, data=data or _data()).rows
    if crossing:
        from benchmarks import kv_split

        with tempfile.TemporaryDirectory(prefix="covey-bench-") as run_dir:
            found = kv_split.run(Path(run_dir), ready_home() / "cache", console, quick=quick, plots=plots)
        report.rows += found.rows
        report.ratios |= found.ratios
    _publish(report, console, target, plots / "kv.png")


@bench.command()
@click.option("--quick", is_flag=True, help="Two thousand tokens instead of eight thousand.")
@click.option("--data", type=click.Path(exists=True, file_okay=False, path_type=Path), help="Public data; $COVEY_DATA.")
@click.option("--json", "target", help="Write the result here; - for standard output.")
@click.option("--model", default=DEFAULT, show_default=True, help="A packaged name, a folder, or a .gguf file.")
def precision(quick: bool, data: Path | None, target: str | None, model: str) -> None:
    """Perplexity on a fixed text, and memory, of every precision of weights and of keys and values."""
    from benchmarks import perplexity as benchmark

    console = Console(stderr=target == "-")
    report = benchmark.run(model, ready_home() / "cache", console, quick=quick, data=data or _data())
    _publish(report, console, target, None)


@bench.command()
@click.option("--peers", is_flag=True, help="Measure those that `make peers` has set up, too.")
@click.option("--quick", is_flag=True, help="2,500 questions of each half of a set: end within five minutes.")
@click.option("--data", type=click.Path(exists=True, file_okay=False, path_type=Path), help="Public data; $COVEY_DATA.")
@click.option("--json", "target", help="Write the result here; - for standard output.")
@click.option("--plots", type=click.Path(file_okay=False, path_type=Path), default=Path(".bench"), show_default=True)
@click.option(
    "--part",
    type=click.Choice(["quality", "examples", "judge", "all"]),
    default="quality",
    show_default=True,
    help="Hits; examples and the choice of a model; finding wrong answers; or all of it.",
)
@click.option("--model", default=DEFAULT, show_default=True, help="Who is shown examples, and who judges.")
def cache(peers: bool, quick: bool, data: Path | None, target: str | None, plots: Path, part: str, model: str) -> None:
    """Right, false and stale hits of semcache, its peers and their rules on the same questions."""
    given = data or _data()
    if given is None:
        raise click.UsageError("name the folder of public data: --data DIR, or COVEY_DATA")
    console = Console(stderr=target == "-")
    from benchmarks.report import Report

    report, cache_dir = Report("cache"), ready_home() / "cache"
    if part in {"quality", "all"}:
        from benchmarks import cache as benchmark

        report = benchmark.run(given, console, quick=quick, with_peers=peers, plots=plots)
    if part in {"examples", "judge", "all"}:
        from benchmarks import cache_models

        cache_models.run(part, report, given, console, model=model, cache_dir=cache_dir, quick=quick, plots=plots)
    _publish(report, console, target, plots / ("cache-examples.png" if part == "examples" else "cache.png"))


@bench.command("cache-index")
@click.option("--quick", is_flag=True, help="10,000 entries: end within two minutes.")
@click.option("--million", is_flag=True, help="1,000,000 entries too: half an hour and 3 GiB more.")
@click.option("--json", "target", help="Write the result here; - for standard output.")
def cache_index(quick: bool, million: bool, target: str | None) -> None:
    """Look-ups beside inserts, memory, rebuilds and quota churn of semcache's index, without an encoder."""
    from benchmarks import cache_index as benchmark

    console = Console(stderr=target == "-")
    _publish(benchmark.run(console, quick=quick, million=million), console, target, None)


def _data() -> Path | None:
    """The folder of public data that the environment names."""
    return Path(os.environ["COVEY_DATA"]) if os.environ.get("COVEY_DATA") else None


def _publish(report: Report, console: Console, target: str | None, plot: Path | None) -> None:
    """A table for people, unless the object goes to standard output; and the object."""
    if target != "-":
        report.print(console)
        if plot is not None:
            console.print(f"plots: {plot}")
    report.write(target)
