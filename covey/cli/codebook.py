"""`covey codebook`: train the codebooks with which stores keep a model's keys and values in four bits."""

from __future__ import annotations

from pathlib import Path

import click
from rich.console import Console
from rich.progress import Progress

from covey.cli.models import DEFAULT
from covey.cli.state import ready_home

TOKENS = 4096


@click.command()
@click.argument("text", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--out", required=True, type=click.Path(dir_okay=False, path_type=Path), help="The codebook's file.")
@click.option("--model", default=DEFAULT, show_default=True, help="A packaged name, a folder, or a .gguf file.")
@click.option("--tokens", default=TOKENS, show_default=True, help="How much of the text; ten seconds each thousand.")
def codebook(text: Path, out: Path, model: str, tokens: int) -> None:
    """Train on a TEXT like those that will be served; name the file in `[kvstore.codecs]` and `kv_codebook`."""
    from covey.model.codebook import train_codebook

    console = Console(stderr=True)
    with Progress(console=console) as progress:
        task = progress.add_task("the text runs through the model", total=None)

        def done(layer: int, layers: int) -> None:
            progress.update(task, description="layers", total=layers, completed=layer + 1)

        found = train_codebook(model, text.read_text(), ready_home() / "cache", tokens=tokens, done=done)
    out.write_bytes(found.to_bytes())
    console.print(f"{out}: {found.model} {found.revision}, id {found.id:016x}, {out.stat().st_size >> 10} KiB")
