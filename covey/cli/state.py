"""Where a mesh keeps its files, and the word that it leaves for its clients."""

from __future__ import annotations

import os
from pathlib import Path

import httpx
import msgspec

from covey.client.endpoints import ENDPOINTS, Endpoints, home


def ready_home() -> Path:
    """The home directory, made if it is not there."""
    path = home()
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    return path


def write_endpoints(run_dir: Path, endpoints: Endpoints) -> None:
    """Publish atomically, for the owner's eyes only."""
    draft = run_dir / f".{ENDPOINTS}.{os.getpid()}"
    draft.write_bytes(msgspec.json.format(msgspec.json.encode(endpoints), indent=2))
    draft.chmod(0o600)
    draft.replace(run_dir / ENDPOINTS)


def http_client(endpoints: Endpoints, *, timeout_s: float = 120.0) -> httpx.AsyncClient:
    """An HTTP client with the mesh's key."""
    headers = {"Authorization": f"Bearer {endpoints.api_key()}"}
    return httpx.AsyncClient(base_url=endpoints.http, headers=headers, timeout=timeout_s, trust_env=False)
