"""The parts of `covey bench cache` that are about models: examples and the choice of a model, and the judge."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from benchmarks import in_context, meta_ranking, nl2bash_examples
from benchmarks.cache_vectors import VectorFile
from benchmarks.report import Report
from services.semcache.minilm import PACKAGED, find_model


def run(
    part: str, report: Report, data: Path, console: Console, *, model: str, cache_dir: Path, quick: bool, plots: Path
) -> None:
    """Add the rows of `examples`, `judge` or `all`.

    Examples: the choice between two models on recorded pairs, and what examples do to `model` on nl2bash. Judge: how
    well `model` finds wrong answers by Meta Ranking.
    """
    if part != "judge":
        vectors = VectorFile(plots, find_model(PACKAGED), threads=2, batch_max=32)
        in_context.measure(report, data, vectors, console, quick=quick, plot=plots / "cache-examples.png")
        nl2bash_examples.measure(report, data, vectors, console, model=model, cache_dir=cache_dir, quick=quick)
    if part != "examples":
        meta_ranking.measure(report, data, console, model=model, cache_dir=cache_dir, quick=quick)
