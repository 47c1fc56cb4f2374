"""Valkey, or Redis where that is what the machine has, as a driver: one server without persistence, pipelined clients.

The client is redis-py with hiredis, its parser in C. Loopback TCP: a Unix socket is no faster for blocks.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import redis
from redis.connection import HIREDIS_AVAILABLE  # type: ignore[attr-defined]

from benchmarks.drivers.kv_load import blocks_of, contents, together
from benchmarks.drivers.lines import private_output, serve
from benchmarks.drivers.ports import free_port, wait_for_port


class ValkeyStore:
    """One operation moves a batch of blocks by `clients` clients, each with its own connection and its own part."""

    def __init__(self, program: str) -> None:
        if not HIREDIS_AVAILABLE:
            raise RuntimeError("hiredis is not there: the comparison would be with a slow parser")
        self._port = free_port()
        settings = ("--save", "", "--appendonly", "no", "--dir", tempfile.gettempdir(), "--io-threads", "1")
        self._server = subprocess.Popen(
            [program, "--port", str(self._port), "--bind", "127.0.0.1", *settings],
            stdin=subprocess.DEVNULL,
            stdout=sys.stderr.fileno(),
        )
        wait_for_port(self._port)
        self._clients: list[redis.Redis] = []
        self._data: dict[int, list[memoryview]] = {}
        self._checked: set[int] = set()

    def put(self, size: int, clients: int) -> float:
        """Seconds to store a batch."""
        self._grow(clients)
        if size not in self._data:
            self._data[size] = contents(size, blocks_of(size))
        data = self._data[size]

        def work(number: int) -> None:
            pipeline = self._clients[number].pipeline(transaction=False)
            for i in range(number, len(data), clients):
                pipeline.set(f"{size}/{i}", data[i])
            pipeline.execute()

        return together(clients, work)

    def get(self, size: int, clients: int) -> float:
        """Seconds to read the batch."""
        self._grow(clients)
        data = self._data[size]

        def work(number: int) -> None:
            pipeline = self._clients[number].pipeline(transaction=False)
            mine = range(number, len(data), clients)
            for i in mine:
                pipeline.get(f"{size}/{i}")
            found = pipeline.execute()
            if size not in self._checked and any(found[n] != data[i] for n, i in enumerate(mine)):
                raise RuntimeError("what was read is not what was stored")

        took_s = together(clients, work)
        self._checked.add(size)  # compared once: the comparison takes time, too
        return took_s

    def close(self) -> None:
        """End the server."""
        self._server.kill()

    def _grow(self, clients: int) -> None:
        while len(self._clients) < clients:
            client = redis.Redis(port=self._port, socket_keepalive=True)
            client.ping()
            self._clients.append(client)


def find_program() -> str:
    """The server that is here: Valkey before Redis."""
    program = shutil.which("valkey-server") or shutil.which("redis-server")
    if program is None:
        raise RuntimeError("there is neither valkey-server nor redis-server")
    return program


def main() -> None:
    """Serve until standard input ends."""
    lines = private_output()
    program = find_program()
    store = ValkeyStore(program)
    version = subprocess.run([program, "--version"], capture_output=True, text=True, check=True).stdout
    named = f"{Path(program).stem.removesuffix('-server')} {version.split('v=')[-1].split()[0]}"
    try:
        serve(named, {"put": store.put, "get": store.get}, lines)
    finally:
        store.close()


if __name__ == "__main__":
    main()
