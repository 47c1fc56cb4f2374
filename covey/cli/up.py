"""`covey up`: the whole mesh as child processes, a progress line each, then how to talk to it."""

from __future__ import annotations

import os
import signal
import socket
from pathlib import Path

import anyio
import click
import msgspec
from rich.console import Console
from rich.live import Live
from rich.table import Table

from covey.cli.files import MeshFiles
from covey.cli.mesh import Mesh, MeshPlan, running
from covey.cli.models import parse_models
from covey.cli.state import ready_home, write_endpoints
from covey.client.endpoints import ENDPOINTS, Endpoints
from covey.errors import InvalidArgument

HTTP_PORT = 8000


class Progress:
    """One line a child, redrawn on a terminal, printed once a change elsewhere."""

    def __init__(self, console: Console, *, as_json: bool) -> None:
        self._console = console
        self._json = as_json
        self._states: dict[str, str] = {}
        self.live: Live | None = None

    def __call__(self, name: str, state: str) -> None:
        self._states[name] = state
        if self._json:
            self._console.print_json(data={"service": name, "state": state}, indent=None)
        elif self.live is not None:
            self.live.update(self._table())
        else:
            self._console.print(f"{name:<14} {state}")

    def _table(self) -> Table:
        table = Table.grid(padding=(0, 2))
        for name, state in self._states.items():
            style = "green" if state.startswith(("ready", "drained")) else "yellow"
            table.add_row(name, f"[{style}]{state}[/]")
        return table


@click.command()
@click.option("--model", "models", multiple=True, help="NAME, PATH, NAME=PATH or NAME=URL; repeat for several.")
@click.option("--prefill", default=1, show_default=True, help="Prefill workers a model.")
@click.option("--decode", default=1, show_default=True, help="Decode workers a model.")
@click.option("--kvstore", default=1, show_default=True, help="KV store nodes.")
@click.option("--port", default=HTTP_PORT, show_default=True, help="HTTP port; 0 takes a free one.")
@click.option("--config", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="Your covey.toml.")
@click.option("--set", "settings", multiple=True, help="One setting, as decode.kv_blocks=512; repeat for several.")
@click.option("--run-dir", type=click.Path(file_okay=False, path_type=Path), help="Where this mesh keeps its files.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object a line instead of tables.")
def up(
    models: tuple[str, ...],
    prefill: int,
    decode: int,
    kvstore: int,
    port: int,
    config: Path | None,
    settings: tuple[str, ...],
    run_dir: Path | None,
    as_json: bool,
) -> None:
    """Start the whole mesh on this machine; Ctrl-C drains it."""
    local, remote = parse_models(models)
    plan = MeshPlan(
        files=MeshFiles(run_dir=run_dir or ready_home() / "run", cache_dir=ready_home() / "cache", base=config),
        models=local,
        remotes=remote,
        prefill=prefill,
        decode=decode,
        kvstore=kvstore,
        http_port=port_or_next(port),
        settings=settings,
    )
    anyio.run(_up, plan, as_json)


def port_or_next(port: int) -> int:
    """`port` if nobody listens on it, otherwise 0: the gateway takes a free one and says which."""
    if port == 0:
        return 0
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except PermissionError as error:
            raise InvalidArgument(f"port {port} needs more rights: choose one above 1023", field="port") from error
        except OSError:
            return 0
    return port


async def _up(plan: MeshPlan, as_json: bool) -> None:
    console = Console()
    progress = Progress(console, as_json=as_json)
    with anyio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(_hold, plan, progress, console, as_json, tasks.cancel_scope)
            async for _ in signals:
                if not as_json:
                    console.print("draining …")
                tasks.cancel_scope.cancel()
                break


async def _hold(plan: MeshPlan, progress: Progress, console: Console, as_json: bool, scope: anyio.CancelScope) -> None:
    live = Live(console=console, refresh_per_second=8, transient=False) if console.is_terminal and not as_json else None
    progress.live = live
    if live is not None:
        live.start()
    try:
        async with running(plan, report=progress) as mesh:
            if live is not None:
                live.stop()
                progress.live = None
            endpoints = publish(mesh)
            _say(console, endpoints, as_json)
            await anyio.sleep_forever()
    finally:
        if live is not None:
            live.stop()
        (plan.files.run_dir / ENDPOINTS).unlink(missing_ok=True)
        scope.cancel()


def publish(mesh: Mesh) -> Endpoints:
    """Write down how to reach the mesh, for other commands and the SDK."""
    files = mesh.plan.files
    endpoints = Endpoints(
        pid=os.getpid(),
        http=mesh.http,
        grpc=mesh.grpc,
        flow=mesh.flow,
        api_key_file=str(files.api_key_file),
        models=[*mesh.plan.models, *mesh.plan.remotes],
        semcache=mesh.semcache,
        mesh_token_file=str(files.mesh_token_file),
    )
    write_endpoints(files.run_dir, endpoints)
    return endpoints


def _say(console: Console, endpoints: Endpoints, as_json: bool) -> None:
    if as_json:
        console.print_json(data={"endpoints": msgspec.to_builtins(endpoints)}, indent=None)
        return
    model = endpoints.models[0]
    console.print(f"\n[bold green]The mesh is up[/] at {endpoints.http} (models: {', '.join(endpoints.models)})\n")
    console.print("Try it:", style="bold")
    console.print(
        f"""  curl {endpoints.http}/v1/chat/completions \\
    -H "Authorization: Bearer $(cat {endpoints.api_key_file})" -H 'Content-Type: application/json' \\
    -d '{{"model": "{model}", "messages": [{{"role": "user", "content": "Say hello."}}]}}'
""",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )
    console.print("Or from Python:", style="bold")
    console.print(
        f"""  from openai import OpenAI
  client = OpenAI(base_url="{endpoints.http}/v1", api_key=open("{endpoints.api_key_file}").read())
  print(client.chat.completions.create(model="{model}", messages=[{{"role": "user", "content": "Hi"}}]))
""",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )
    console.print("`covey chat`, `covey demo` and `covey run FILE.py` find it by themselves. Ctrl-C drains it.")
