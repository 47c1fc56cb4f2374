"""How a client on the same machine finds the mesh that `covey up` started."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import msgspec

from covey.errors import InvalidArgument, Unavailable

ENDPOINTS = "endpoints.json"


class Endpoints(msgspec.Struct, frozen=True, kw_only=True):
    """What a client needs of the file that `covey up` writes; it may hold more."""

    grpc: str
    flow: str
    api_key_file: str


@dataclass(frozen=True, slots=True, kw_only=True)
class RunningMesh:
    """`host:port` of the gateway and of agentflow, and a key for both."""

    gateway: str
    flow: str
    api_key: str


def running_mesh(run_dir: Path | str | None) -> RunningMesh:
    """Read where the mesh is; reads files, so call it in a thread.

    Raises:
        Unavailable: no mesh runs from there.
        InvalidArgument: its files cannot be read.
    """
    directory = Path(run_dir or _default_run_dir()).expanduser()
    file = directory / ENDPOINTS
    try:
        endpoints = msgspec.json.decode(file.read_bytes(), type=Endpoints)
        key = Path(endpoints.api_key_file).read_text().strip()
    except FileNotFoundError as error:
        raise Unavailable(f"no mesh runs from {directory}: start one with `covey up`", field="run_dir") from error
    except (OSError, msgspec.MsgspecError) as error:
        raise InvalidArgument(f"{file} cannot be read: {error}", field="run_dir") from error
    return RunningMesh(gateway=endpoints.grpc, flow=endpoints.flow, api_key=key)


def _default_run_dir() -> str:
    """The SDK runs in the user's process, so this is its edge: `covey run` says here which mesh is meant."""
    return os.environ.get("COVEY_RUN_DIR") or f"{os.environ.get('COVEY_HOME', '~/.covey')}/run"
