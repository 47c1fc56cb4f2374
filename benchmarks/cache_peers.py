"""The caches that semcache is compared with as they are: real packages in environments of their own."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from benchmarks.cache_ours import Played
from benchmarks.cache_rules import BUDGET, Stream
from benchmarks.child import Child, driver_command, plain_environment
from benchmarks.drivers.questions import FALSE
from benchmarks.peers import python_of, read_state
from covey.clock import Clock
from covey.errors import CoveyError

DRIVERS = {"gptcache": "gptcache_store", "redisvl": "redisvl_store"}
START_LIMIT_S = 120.0
STREAM_LIMIT_S = 900.0
STEP = 0.001
TRIES = 3


def missing() -> dict[str, str]:
    """The peers that cannot be had, and why."""
    states = {name: read_state(name) for name in DRIVERS}
    return {name: state.reason for name, state in states.items() if not state.ok}


def play_peer(
    name: str, streams: list[Stream], tau: float, folder: Path, clock: Clock
) -> tuple[float, dict[str, Played]]:
    """Play every stream through an empty cache of the real package; returns the threshold and what came of each.

    `tau` is the best one by our own search; should the package itself be over the budget with it, it becomes stricter
    by 0.001, three times at most. Raises `CoveyError` when the package fails.
    """
    command = driver_command(python_of(name), DRIVERS[name])
    environment = plain_environment() | {"OMP_NUM_THREADS": "1"}
    child = Child(command, environment=environment, log=folder / f"{name}.log", clock=clock)
    try:
        child.until_ready(START_LIMIT_S)
        for attempt in range(TRIES + 1):
            setting = tau + attempt * STEP
            played = {stream.name: _play(child, stream, setting, folder) for stream in streams}
            false = sum(int((one.outcomes == FALSE).sum()) for one in played.values())
            if false <= BUDGET * sum(len(stream) for stream in streams):
                break
        return setting, played
    finally:
        child.close()


def _play(child: Child, stream: Stream, tau: float, folder: Path) -> Played:
    place = folder / stream.name
    place.mkdir(exist_ok=True)
    (place / "texts.json").write_text(json.dumps(stream.keys))
    np.save(place / "answers.npy", stream.answers)
    np.save(place / "vectors.npy", stream.vectors)
    answer = child.ask("stream", STREAM_LIMIT_S, folder=str(place), tau=tau)
    return Played(
        outcomes=np.array(answer["outcomes"], dtype=np.int8),
        lookup_s=answer["lookup_s"],
        insert_s=answer["insert_s"],
        memory_bytes=int(answer["memory_bytes"]),
    )


def reason(error: CoveyError) -> str:
    """Why a peer is left out, in one line."""
    return str(error).strip().splitlines()[-1][:300]
