"""Mooncake Store as a driver: its master, one process that lends memory, and clients that reach it over TCP.

Clients read and write registered memory without copies (`batch_put_from`, `batch_get_into`), its fastest way.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import mooncake
from mooncake.store import MooncakeDistributedStore

from benchmarks.drivers.kv_load import BATCH_BYTES, blocks_of, contents, together
from benchmarks.drivers.lines import private_output, serve
from benchmarks.drivers.ports import free_port, wait_for_port

SEGMENT_BYTES = 1 << 30
LOCAL_BYTES = 16 << 20


class MooncakeStore:
    """One operation moves a batch of blocks by `clients` clients, each with its own connection and its own part."""

    def __init__(self) -> None:
        self._master_port = free_port()
        program = Path(mooncake.__file__).parent / "mooncake_master"
        ports = [f"--rpc_port={self._master_port}", f"--metrics_port={free_port()}", "--default_kv_lease_ttl=5000"]
        self._helpers = [start([str(program), *ports])]
        wait_for_port(self._master_port)
        self._helpers.append(start([sys.executable, *lender_arguments(), str(self._master_port)]))
        self._clients: list[tuple[Any, bytearray]] = []
        self._names: dict[int, list[str]] = {}
        self._round = 0
        self._grow(1)

    def put(self, size: int, clients: int) -> float:
        """Seconds to store a batch under new names."""
        self._grow(clients)
        count = blocks_of(size)
        self._forget(size)
        self._round += 1
        names = self._names[size] = [f"{size}/{self._round}/{i}" for i in range(count)]

        def work(number: int) -> None:
            store, memory = self._clients[number]
            mine = names[number::clients]
            done = store.batch_put_from(mine, self._places(memory, size, mine), [size] * len(mine))
            if any(code != 0 for code in done):
                raise RuntimeError(f"batch_put_from returned {done}")

        return together(clients, work)

    def get(self, size: int, clients: int) -> float:
        """Seconds to read the batch that was stored last."""
        self._grow(clients)
        names = self._names[size]

        def work(number: int) -> None:
            store, memory = self._clients[number]
            mine = names[number::clients]
            done = store.batch_get_into(mine, self._places(memory, size, mine), [size] * len(mine))
            if any(code != size for code in done):
                raise RuntimeError(f"batch_get_into returned {done}")

        return together(clients, work)

    def close(self) -> None:
        """End the helpers."""
        for helper in self._helpers:
            helper.kill()

    def _forget(self, size: int) -> None:
        """Remove the batch before, also under its leases: the memory is free for the next."""
        if size in self._names:
            self._clients[0][0].batch_remove(self._names.pop(size), True)

    def _grow(self, clients: int) -> None:
        while len(self._clients) < clients:
            store = MooncakeDistributedStore()
            set_up(store, self._master_port, 0, LOCAL_BYTES)
            memory = bytearray(BATCH_BYTES if not self._clients else BATCH_BYTES // 8)
            memory[:] = b"".join(contents(len(memory), 1))
            if store.register_buffer(address_of(memory), len(memory)) != 0:
                raise RuntimeError("register_buffer failed")
            self._clients.append((store, memory))

    @staticmethod
    def _places(memory: bytearray, size: int, names: list[str]) -> list[int]:
        start = address_of(memory)
        return [start + i * size for i in range(len(names))]


def address_of(memory: bytearray) -> int:
    """Where a buffer lies."""
    return ctypes.addressof(ctypes.c_char.from_buffer(memory))


def set_up(store: Any, master_port: int, lent_bytes: int, local_bytes: int) -> None:
    """Join the store. Raises RuntimeError when that fails."""
    code = store.setup("127.0.0.1", "P2PHANDSHAKE", lent_bytes, local_bytes, "tcp", "", f"127.0.0.1:{master_port}")
    if code != 0:
        raise RuntimeError(f"setup returned {code}")


def lender_arguments() -> list[str]:
    """How this module is started as the process that lends memory."""
    root = str(Path(__file__).resolve().parent.parent.parent)
    code = f"import sys; sys.path.append({root!r}); from benchmarks.drivers.mooncake_kv import lend; lend(sys.argv[1])"
    return ["-c", code]


def lend(master_port: str) -> None:
    """Lend memory until the parent ends."""
    store = MooncakeDistributedStore()
    set_up(store, int(master_port), SEGMENT_BYTES, LOCAL_BYTES)
    print("lent", flush=True)
    sys.stdin.read()


def start(command: list[str]) -> subprocess.Popen[bytes]:
    """Start a helper in our process group; its output joins standard error."""
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=sys.stderr.fileno())


def main() -> None:
    """Serve until standard input ends."""
    lines = private_output()
    os.environ.setdefault("MC_LOG_LEVEL", "ERROR")
    store = MooncakeStore()
    try:
        serve(sys.argv[1], {"put": store.put, "get": store.get}, lines)
    finally:
        store.close()


if __name__ == "__main__":
    main()
