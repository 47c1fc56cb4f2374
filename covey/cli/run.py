"""`covey run FILE.py`: run a program of yours with the mesh's address and key in its environment."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import click

from covey.client.endpoints import running_mesh


@click.command(context_settings={"ignore_unknown_options": True})
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
@click.option("--run-dir", type=click.Path(file_okay=False, path_type=Path), help="Of which mesh.")
def run(file: Path, arguments: tuple[str, ...], run_dir: Path | None) -> None:
    """Run FILE; `covey.Client.connect()` and the OpenAI client find the mesh by themselves."""
    endpoints = running_mesh(run_dir)
    environment = {
        **os.environ,
        "COVEY_RUN_DIR": str(Path(endpoints.api_key_file).parent),
        "OPENAI_BASE_URL": f"{endpoints.http}/v1",
        "OPENAI_API_KEY": endpoints.api_key(),
    }
    sys.exit(subprocess.run([sys.executable, str(file), *arguments], env=environment, check=False).returncode)
