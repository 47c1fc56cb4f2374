"""Real meshes for tests: every service a process, real NATS, a tiny random model or the packaged one."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx

from covey.cli.files import MeshFiles
from covey.cli.mesh import Mesh, MeshPlan, running
from covey.cli.state import http_client
from covey.cli.up import publish
from tests.support.tiny_llama import write_tiny_llama

TINY = "tiny"
PACKAGED = "smollm2"
LEAN = ("semcache.preload=false",)
"""The encoder takes seconds of a core to load: only tests that need it at once pay for it, by a setting of theirs."""


@asynccontextmanager
async def mesh_of(
    folder: Path,
    *,
    model: str = TINY,
    cache_dir: Path | None = None,
    settings: tuple[str, ...] = (),
    base: Path | None = None,
    **plan: Any,
) -> AsyncIterator[Mesh]:
    """Start a mesh with its files under `folder`; children that end stay ended, so that a fault is seen as it is.

    `base` is a `covey.toml` as a user writes it.
    """
    source = str(write_tiny_llama(folder / "model")) if model == TINY else model
    files = MeshFiles(run_dir=folder / "run", cache_dir=cache_dir or folder / "cache", base=base)
    chosen = MeshPlan(files=files, models={model: source}, settings=(*LEAN, *settings), restart=False, **plan)
    async with running(chosen) as mesh:
        yield mesh


@asynccontextmanager
async def client_of(mesh: Mesh) -> AsyncIterator[httpx.AsyncClient]:
    """An HTTP client with the key of the local tenant."""
    async with http_client(publish(mesh), timeout_s=180.0) as client:
        yield client


def chat_body(model: str, prompt: str, **options: Any) -> dict[str, Any]:
    """A greedy chat request that no cache answers."""
    return {
        "model": model,
        "messages": [{"role": "user", "content": prompt}],
        "temperature": 0,
        "cache": "bypass",
        **options,
    }
