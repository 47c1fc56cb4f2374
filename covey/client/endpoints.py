"""How a client on the same machine finds the mesh that `covey up` started."""

from __future__ import annotations

import os
from pathlib import Path

import msgspec

from covey.errors import InvalidArgument, Unavailable

ENDPOINTS = "endpoints.json"


class Endpoints(msgspec.Struct, frozen=True, kw_only=True):
    """Where a running mesh is; written by `covey up`, read by every other command and by the SDK."""

    pid: int
    """Of the launcher: with it the mesh ends."""
    http: str
    grpc: str
    flow: str
    api_key_file: str
    models: list[str]
    semcache: str = ""
    """Of the semantic cache, for `covey cache`; it asks for the mesh token."""
    mesh_token_file: str = ""

    def api_key(self) -> str:
        """The local tenant's key."""
        return Path(self.api_key_file).read_text().strip()


def home() -> Path:
    """`$COVEY_HOME`, or `~/.covey`: weights cache, run directories, keys."""
    return Path(os.environ.get("COVEY_HOME", "~/.covey")).expanduser()


def running_mesh(run_dir: Path | str | None = None) -> Endpoints:
    """Find the mesh of a run directory: the given one, the one `covey run` names, or the default.

    Reads files, so call it in a thread.

    Raises:
        Unavailable: no mesh runs from there.
        InvalidArgument: its files cannot be read.
    """
    directory = Path(run_dir or os.environ.get("COVEY_RUN_DIR") or home() / "run").expanduser()
    file = directory / ENDPOINTS
    try:
        endpoints = msgspec.json.decode(file.read_bytes(), type=Endpoints)
    except FileNotFoundError as error:
        raise Unavailable(f"no mesh runs from {directory}: start one with `covey up`", field="run_dir") from error
    except (OSError, msgspec.MsgspecError) as error:
        raise InvalidArgument(f"{file} cannot be read: {error}", field="run_dir") from error
    if not _is_alive(endpoints.pid):
        gone = f"the mesh of {directory} is gone (pid {endpoints.pid}): start one with `covey up`"
        raise Unavailable(gone, field="run_dir")
    return endpoints


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
