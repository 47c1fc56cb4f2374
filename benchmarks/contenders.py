"""The systems of `covey bench engine`: how each is started, and which of them are here."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from benchmarks.child import driver_command, plain_environment
from benchmarks.export import export
from benchmarks.peers import python_of, read_state
from covey.errors import CoveyError
from covey.model.share import thread_environment
from covey.model.source import ModelSource

KV_CACHE_GIB = 2
START_LIMIT_S = 300.0
COMPILED_START_LIMIT_S = 900.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Contender:
    """A system under one setting. `peer` is its word in ratios (empty: ours); `precision` that of its weights."""

    name: str
    precision: str
    command: tuple[str, ...]
    environment: Mapping[str, str]
    peer: str = ""
    start_limit_s: float = START_LIMIT_S

    @property
    def is_ours(self) -> bool:
        """Whether it is Covey's runner."""
        return not self.peer


def ours(model: str, cache_dir: Path, precision: str) -> Contender:
    """Our runner, its threads set up as our services set them up."""
    return Contender(
        name="covey",
        precision=precision,
        command=tuple(driver_command(sys.executable, "covey_model", model, str(cache_dir), precision)),
        environment=plain_environment() | thread_environment(),
    )


def machine(model: str) -> Contender:
    """What measures the machine's limits and bare products."""
    return Contender(
        name="machine",
        precision="",
        command=tuple(driver_command(sys.executable, "machine", model)),
        environment=plain_environment(),
    )


def peers(source: ModelSource, cache_dir: Path, *, quick: bool) -> tuple[list[Contender], dict[str, str]]:
    """The peers that `make peers` has set up, and why the others are missing. Quick: without compiled vLLM."""
    found: list[Contender] = []
    missing: dict[str, str] = {}
    states = {name: read_state(name) for name in ("vllm", "transformers", "llamacpp")}
    missing |= {name: state.reason for name, state in states.items() if not state.ok}
    needs_folder = states["vllm"].ok or states["transformers"].ok
    try:
        folder = export(source, cache_dir) if needs_folder else cache_dir
    except CoveyError as error:
        return [], dict.fromkeys(states, str(error))
    if states["vllm"].ok:
        found += [_vllm(folder, mode) for mode in (("eager",) if quick else ("eager", "compiled"))]
    if states["transformers"].ok:
        found.append(_transformers(folder))
    if states["llamacpp"].ok:
        if source.kind == "gguf":
            found.append(_llamacpp(source, states["llamacpp"].version))
        else:
            missing["llamacpp"] = "it runs GGUF files only, and this model is a folder"
    return found, missing


def _vllm(folder: Path, mode: str) -> Contender:
    cores = ",".join(map(str, sorted(os.sched_getaffinity(0))))
    return Contender(
        name=f"vllm-{mode}",
        peer="vllm",
        precision="fp32",
        command=tuple(driver_command(python_of("vllm"), "vllm_model", str(folder), mode)),
        environment=plain_environment()
        | {
            "VLLM_CPU_OMP_THREADS_BIND": cores,
            "VLLM_CPU_KVCACHE_SPACE": str(KV_CACHE_GIB),
            "VLLM_NO_USAGE_STATS": "1",
            # Its engine runs in the driver itself: a step is timed without messages between processes.
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        },
        start_limit_s=COMPILED_START_LIMIT_S if mode == "compiled" else START_LIMIT_S,
    )


def _transformers(folder: Path) -> Contender:
    return Contender(
        name="transformers",
        peer="transformers",
        precision="fp32",
        command=tuple(driver_command(python_of("transformers"), "transformers_model", str(folder))),
        environment=plain_environment(),
    )


def _llamacpp(source: ModelSource, version: str) -> Contender:
    libraries = python_of("llamacpp").parent.parent / "node_modules/@node-llama-cpp/linux-x64/bins/linux-x64"
    command = driver_command(python_of("llamacpp"), "llamacpp_model", str(libraries), str(source.path), version)
    return Contender(
        name="llamacpp",
        peer="llamacpp",
        precision=source.path.stem.rpartition(".")[2].lower(),
        command=tuple(command),
        environment=plain_environment(),
    )
