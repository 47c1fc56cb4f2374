"""GPTCache as a driver: its own adapter, faiss and SQLite; its embedding hook returns the vectors that it is given."""

from __future__ import annotations

import shutil
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

from gptcache import Cache, Config  # type: ignore[import-not-found,unused-ignore]
from gptcache.adapter.api import get, put  # type: ignore[import-not-found,unused-ignore]
from gptcache.manager import CacheBase, VectorBase, get_data_manager  # type: ignore[import-not-found,unused-ignore]
from gptcache.processor.pre import get_prompt  # type: ignore[import-not-found,unused-ignore]
from gptcache.similarity_evaluation.distance import (  # type: ignore[import-not-found,unused-ignore]
    SearchDistanceEvaluation,
)

from benchmarks.drivers.lines import private_output, serve
from benchmarks.drivers.questions import play

MEMORY = "/dev/shm"  # noqa: S108 - a private folder in it; SQLite waits for the disk at each of its many commits
FLUSH_EVERY = 1_000_000
"""It would write its whole index to disk every 20 insertions."""


def stream(folder: str, tau: float) -> dict[str, Any]:
    """Play a stream through an empty cache that serves from cosine similarity `tau` on."""
    place = mkdtemp(prefix="gptcache-", dir=MEMORY if Path(MEMORY).is_dir() else folder)
    try:
        return _stream(folder, place, tau)
    finally:
        shutil.rmtree(place)


def _stream(folder: str, place: str, tau: float) -> dict[str, Any]:
    current: list[Any] = []
    cache = Cache()
    base = CacheBase("sqlite", sql_url=f"sqlite:///{Path(place) / 'cache.db'}")
    index = VectorBase("faiss", dimension=384, index_path=str(Path(place) / "faiss.index"))
    cache.init(
        pre_embedding_func=get_prompt,
        embedding_func=lambda _text, **_: current[0],
        data_manager=get_data_manager(base, index, max_size=FLUSH_EVERY),
        similarity_evaluation=SearchDistanceEvaluation(),
        # Its score of unit vectors is 2 + 2 cos of at most 4, and the threshold is a share of that.
        config=Config(similarity_threshold=(1.0 + tau) / 2.0, auto_flush=FLUSH_EVERY, disable_report=True),
    )

    def look_up(text: str, vector: Any) -> str | None:
        current[:] = [vector]
        found = get(text, cache_obj=cache)
        return None if found is None else str(found)

    def keep(text: str, answer: str, vector: Any) -> None:
        current[:] = [vector]
        put(text, answer, cache_obj=cache)

    return play(folder, look_up, keep)


def main() -> None:
    """Serve until standard input ends."""
    lines = private_output()
    from importlib.metadata import version

    serve(version("gptcache"), {"stream": stream}, lines)


if __name__ == "__main__":
    main()
