"""`covey chat`: talk to a model of the running mesh from the terminal."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import anyio
import click
import httpx
from rich.console import Console

from covey.cli.state import http_client
from covey.client.endpoints import running_mesh
from covey.errors import Unavailable

DATA = "data: "


@click.command()
@click.argument("prompt", required=False)
@click.option("--model", help="Which model; the first of the mesh by default.")
@click.option("--max-tokens", default=256, show_default=True)
@click.option("--temperature", default=0.0, show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print the chunks as they come.")
@click.option("--run-dir", type=click.Path(file_okay=False, path_type=Path), help="Of which mesh.")
def chat(
    prompt: str | None, model: str | None, max_tokens: int, temperature: float, as_json: bool, run_dir: Path | None
) -> None:
    """Send PROMPT, or keep talking until Ctrl-D."""
    anyio.run(_chat, prompt, model, {"max_tokens": max_tokens, "temperature": temperature}, as_json, run_dir)


async def _chat(
    prompt: str | None, model: str | None, options: dict[str, Any], as_json: bool, run_dir: Path | None
) -> None:
    endpoints = running_mesh(run_dir)
    console = Console()
    history: list[dict[str, str]] = []
    async with http_client(endpoints) as client:
        while True:
            text = prompt or await _ask(console)
            if text is None:
                return
            history.append({"role": "user", "content": text})
            body = {"model": model or endpoints.models[0], "messages": history, **options}
            answer = ""
            async for chunk in stream_chat(client, body):
                if as_json:
                    console.print_json(data=chunk, indent=None)
                    continue
                piece = delta_text(chunk)
                answer += piece
                console.print(piece, end="", markup=False, highlight=False, soft_wrap=True)
            console.print()
            history.append({"role": "assistant", "content": answer})
            if prompt:
                return


async def _ask(console: Console) -> str | None:
    try:
        return await anyio.to_thread.run_sync(lambda: console.input("[bold cyan]> [/]"), abandon_on_cancel=True)
    except EOFError:
        return None


async def stream_chat(client: httpx.AsyncClient, body: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
    """Stream the chunks of one chat completion, usage included.

    Raises:
        Unavailable: the mesh refused or failed; the message is its own.
    """
    body = {**body, "stream": True, "stream_options": {"include_usage": True}}
    try:
        async for chunk in _chunks(client, body):
            yield chunk
    except httpx.TransportError as error:
        raise Unavailable(f"the mesh does not answer at {client.base_url}: {error}") from error


async def _chunks(client: httpx.AsyncClient, body: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
    async with client.stream("POST", "/v1/chat/completions", json=body) as response:
        if response.status_code != httpx.codes.OK:
            await response.aread()
            raise Unavailable(response.json()["error"]["message"])
        async for line in response.aiter_lines():
            if not line.startswith(DATA) or line == DATA + "[DONE]":
                continue
            chunk: dict[str, Any] = json.loads(line.removeprefix(DATA))
            if "error" in chunk:
                raise Unavailable(chunk["error"]["message"])
            yield chunk


def delta_text(chunk: dict[str, Any]) -> str:
    """The new text of a chunk, if any."""
    return "".join(choice["delta"].get("content") or "" for choice in chunk["choices"])
