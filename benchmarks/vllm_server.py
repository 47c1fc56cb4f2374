"""vLLM's OpenAI server as a system to compare with: the same weights in fp32, the same cores, prefix caching on."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import anyio
import httpx
from anyio.abc import Process

from benchmarks.system import Serving
from covey.clock import Clock
from covey.errors import DeadlineExceeded, Unavailable
from covey.testing import free_port

READY_LIMIT_S = {"eager": 240.0, "compiled": 900.0}
POLL_S = 0.1
GRACE_S = 20.0
KILL_WAIT_S = 5.0
CONTEXT_TOKENS = 4096
KV_CACHE_GIB = 2
LOG_TAIL_LINES = 12


@dataclass(frozen=True, slots=True, kw_only=True)
class Vllm:
    """A server of `folder` under `model`, run by the peer's own `python`; `mode` is `eager` or `compiled`."""

    python: Path
    folder: Path
    model: str
    log: Path
    clock: Clock
    mode: str = "eager"
    name: str = "vllm"
    extra: Mapping[str, Any] = field(default_factory=dict)

    def command(self, port: int) -> list[str]:
        """The server's command line; `-P` keeps the working directory off its path."""
        flags = ["--host", "127.0.0.1", "--port", str(port), "--model", str(self.folder)]
        flags += ["--served-model-name", self.model, "--dtype", "float32", "--enable-prefix-caching"]
        flags += ["--max-model-len", str(CONTEXT_TOKENS)]
        if self.mode == "eager":
            flags.append("--enforce-eager")
        return [str(self.python), "-P", "-m", "vllm.entrypoints.openai.api_server", *flags]

    def environment(self) -> dict[str, str]:
        """Ours, without what belongs to our own Python and thread settings; all cores that we have, and no network."""
        cores = sorted(os.sched_getaffinity(0))
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "OMP_", "GOMP_", "KMP_", "MKL_"))}
        kept.pop("VIRTUAL_ENV", None)
        return kept | {
            "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cores)),
            "VLLM_CPU_KVCACHE_SPACE": str(KV_CACHE_GIB),
            "VLLM_NO_USAGE_STATS": "1",
            "HF_HUB_OFFLINE": "1",
            "TRANSFORMERS_OFFLINE": "1",
        }

    @asynccontextmanager
    async def serving(self) -> AsyncIterator[Serving]:
        began = self.clock.now()
        port = free_port()
        with self.log.open("wb") as sink:
            process = await anyio.open_process(
                self.command(port),
                stdin=subprocess.DEVNULL,
                stdout=sink,
                stderr=sink,
                env=self.environment(),
                cwd=self.log.parent,
                # Its engine is a process of its own: the group is ours to end as a whole.
                start_new_session=True,
            )
        try:
            base = f"http://127.0.0.1:{port}"
            async with httpx.AsyncClient(base_url=base, timeout=120.0, trust_env=False) as client:
                await self._until_ready(client, process)
                ready_s = self.clock.now() - began
                yield Serving(client=client, ready_s=ready_s, pids=_group(process.pid))
        finally:
            await _stop(process)

    async def _until_ready(self, client: httpx.AsyncClient, process: Process) -> None:
        limit_s = READY_LIMIT_S[self.mode]
        try:
            with anyio.fail_after(limit_s):
                while not await _healthy(client):
                    if process.returncode is not None:
                        raise Unavailable(f"vLLM ended at start with exit code {process.returncode}:\n{self.tail()}")
                    await anyio.sleep(POLL_S)
        except TimeoutError as error:
            raise DeadlineExceeded(f"vLLM ({self.mode}) was not ready within {limit_s:g} s:\n{self.tail()}") from error

    def tail(self) -> str:
        """The last lines of its log."""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-LOG_TAIL_LINES:])


async def _healthy(client: httpx.AsyncClient) -> bool:
    try:
        return (await client.get("/health")).status_code == httpx.codes.OK
    except httpx.TransportError:
        return False


def _group(leader: int) -> dict[str, int]:
    """The processes of a group by pid: `server` and its workers."""
    members = [int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit() and _is_member(path, leader)]
    others = sorted(pid for pid in members if pid != leader)
    return {"server": leader} | {f"worker_{i}": pid for i, pid in enumerate(others)}


def _is_member(path: Path, leader: int) -> bool:
    try:
        return os.getpgid(int(path.name)) == leader and not _is_zombie(path)
    except (ProcessLookupError, FileNotFoundError):
        return False


def _is_zombie(path: Path) -> bool:
    return (path / "stat").read_text().rpartition(")")[2].split()[0] == "Z"


async def _stop(process: Process) -> None:
    """Ask the server to end, wait for it and its workers, and end what is left of its group."""
    with anyio.CancelScope(shield=True):
        if process.returncode is None:
            process.send_signal(signal.SIGTERM)
        with anyio.move_on_after(GRACE_S):
            await process.wait()
            # The last of them takes the shared memory away; killed too early, it would stay.
            while len(_group(process.pid)) > 1:  # noqa: ASYNC110 - they are no children of ours
                await anyio.sleep(POLL_S)
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        with anyio.fail_after(KILL_WAIT_S):
            await process.wait()
