"""Where a mesh keeps its files, and how a client on this machine finds it."""

from __future__ import annotations

import os
from pathlib import Path

import httpx
import msgspec

from covey.errors import Unavailable

ENDPOINTS = "endpoints.json"


class Endpoints(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """How to reach a running mesh; written by `covey up`, read by every other command and by the SDK."""

    pid: int
    http: str
    grpc: str
    flow: str
    api_key_file: str
    models: list[str]


def home() -> Path:
    """`$COVEY_HOME`, or `~/.covey`: weights cache, run directories, keys."""
    path = Path(os.environ.get("COVEY_HOME", "~/.covey")).expanduser()
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    return path


def write_endpoints(run_dir: Path, endpoints: Endpoints) -> None:
    """Publish atomically, for the owner's eyes only."""
    draft = run_dir / f".{ENDPOINTS}.{os.getpid()}"
    draft.write_bytes(msgspec.json.format(msgspec.json.encode(endpoints), indent=2))
    draft.chmod(0o600)
    draft.replace(run_dir / ENDPOINTS)


def read_endpoints(run_dir: Path) -> Endpoints:
    """The running mesh.

    Raises:
        Unavailable: none runs here.
    """
    try:
        endpoints = msgspec.json.decode((run_dir / ENDPOINTS).read_bytes(), type=Endpoints)
    except FileNotFoundError as error:
        raise Unavailable(f"no mesh runs from {run_dir}: start one with `covey up`") from error
    if not _alive(endpoints.pid):
        raise Unavailable(f"the mesh of {run_dir} is gone (pid {endpoints.pid}): start one with `covey up`")
    return endpoints


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def http_client(endpoints: Endpoints, *, timeout_s: float = 120.0) -> httpx.AsyncClient:
    """An HTTP client with the mesh's key."""
    key = Path(endpoints.api_key_file).read_text().strip()
    return httpx.AsyncClient(
        base_url=endpoints.http, headers={"Authorization": f"Bearer {key}"}, timeout=timeout_s, trust_env=False
    )
