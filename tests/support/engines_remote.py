"""Real engines of the remote tier on loopback: redis-server, alone and as a cluster, and an S3 server."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from covey.clock import MonotonicClock
from covey.testing import free_port

REDIS = shutil.which("redis-server")
S3_CREDENTIALS = "test:test"
CLOCK = MonotonicClock()


class RedisServer:
    """A redis-server that keeps nothing on disk; `freeze` and `thaw` stop it in its tracks and let it go on."""

    def __init__(self, directory: Path, *, cluster: bool = False) -> None:
        assert REDIS is not None
        self.port = free_port()
        self._directory = directory
        self._cluster = cluster
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"redis{'+cluster' if self._cluster else ''}://127.0.0.1:{self.port}"

    def start(self) -> None:
        cluster = ("--cluster-enabled", "yes", "--cluster-port", str(free_port())) if self._cluster else ()
        self._process = subprocess.Popen(
            [str(REDIS), "--port", str(self.port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no",
             "--dir", str(self._directory), *cluster],
            stdout=subprocess.DEVNULL,
        )  # fmt: skip
        self._until(b"PING", b"+PONG")
        if self._cluster:
            self._until(b"CLUSTER ADDSLOTSRANGE 0 16383", b"+OK")
            self._until(b"CLUSTER INFO", b"cluster_state:ok")

    def kill(self) -> None:
        assert self._process is not None
        self._process.kill()
        self._process.wait(10)

    def freeze(self) -> None:
        assert self._process is not None
        os.kill(self._process.pid, signal.SIGSTOP)

    def thaw(self) -> None:
        assert self._process is not None
        os.kill(self._process.pid, signal.SIGCONT)

    def command(self, line: bytes) -> bytes:
        """Send one command and return the start of the answer."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=5) as connection:
            connection.sendall(line + b"\r\n")
            return connection.recv(65536)

    def _until(self, line: bytes, expected: bytes) -> None:
        deadline = CLOCK.now() + 10
        while True:
            try:
                if expected in self.command(line):
                    return
            except OSError:
                assert self._process is not None
                assert self._process.poll() is None, "redis-server ended"
            assert CLOCK.now() < deadline, f"no {expected!r}"
            threading.Event().wait(0.02)


@contextmanager
def redis_server(directory: Path, *, cluster: bool = False) -> Iterator[RedisServer]:
    server = RedisServer(directory, cluster=cluster)
    server.start()
    try:
        yield server
    finally:
        server.kill()


@contextmanager
def s3_server(bucket: str) -> Iterator[str]:
    """Yield the endpoint of an S3 server that has a bucket: moto's, in a process of its own."""
    port = free_port()
    process = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        deadline = CLOCK.now() + 30
        while not _put_bucket(port, bucket):
            assert process.poll() is None, "the S3 server ended"
            assert CLOCK.now() < deadline, "the S3 server did not come up"
            threading.Event().wait(0.05)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(10)


def _put_bucket(port: int, bucket: str) -> bool:
    request = f"PUT /{bucket} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=5) as connection:
            connection.sendall(request.encode())
            return b" 200 " in connection.recv(1024)
    except OSError:
        return False
