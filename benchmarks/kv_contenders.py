"""The systems of `covey bench kv`: how each is started, and which of the peers are here."""

from __future__ import annotations

import sys
from pathlib import Path

from benchmarks.child import driver_command, plain_environment
from benchmarks.contenders import Contender
from benchmarks.peers import python_of, read_state

PEERS = ("valkey", "mooncake")


def ours(run_dir: Path) -> Contender:
    """A node of our store and its clients."""
    return _contender("covey", sys.executable, "covey_kv", str(run_dir))


def memory() -> Contender:
    """What copies memory and does nothing else."""
    return _contender("memcpy", sys.executable, "memcpy_kv")


def peers() -> tuple[list[Contender], dict[str, str]]:
    """The stores that `make peers` has set up, and why the others are missing."""
    states = {name: read_state(name) for name in PEERS}
    found = [
        _contender(name, str(python_of(name)), f"{name}_kv", state.version, peer=name)
        for name, state in states.items()
        if state.ok
    ]
    return found, {name: state.reason for name, state in states.items() if not state.ok}


def _contender(name: str, python: str, module: str, *arguments: str, peer: str = "") -> Contender:
    return Contender(
        name=name,
        precision="",
        command=tuple(driver_command(python, module, *arguments)),
        environment=plain_environment(),
        peer=peer,
    )
