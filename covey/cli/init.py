"""`covey init`: write the secrets and the configuration of a deployment into a directory that its services share."""

from __future__ import annotations

from pathlib import Path

import click

from covey.cli.files import MeshFiles
from covey.cli.models import parse_models
from covey.net.embedded import write_server_config


@click.command()
@click.argument("directory", type=click.Path(file_okay=False, path_type=Path))
@click.option("--model", "models", multiple=True, help="As in `covey up`.")
@click.option("--nats", default="nats://nats:4222", show_default=True, help="Where services find NATS.")
@click.option("--cache-dir", type=click.Path(path_type=Path), default=Path("/var/cache/covey"), show_default=True)
@click.option("--jetstream-dir", type=click.Path(path_type=Path), default=Path("/data"), show_default=True)
def init(directory: Path, models: tuple[str, ...], nats: str, cache_dir: Path, jetstream_dir: Path) -> None:
    """Fill DIRECTORY; what is there already is kept, so that it may run at every start."""
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    local, remotes = parse_models(models)
    everywhere = "0.0.0.0"  # noqa: S104 - inside the deployment's own network
    token_file = write_server_config(directory, host=everywhere, port=4222, monitor_port=8222, store_dir=jetstream_dir)
    files = MeshFiles(run_dir=directory, cache_dir=cache_dir)
    files.write(nats_url=nats, nats_token_file=token_file, models=local, remotes=remotes)
    click.echo(f"wrote {files.config}")
