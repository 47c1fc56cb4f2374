"""A semcache process without its network: offers numbered answers, says which were acknowledged, until it is killed."""

from __future__ import annotations

import sys
from pathlib import Path
from random import Random

import anyio
import structlog

from covey import failpoint
from covey.clock import MonotonicClock
from covey.policy.reuse import ReuseMode
from services.semcache.config import CategoryConfig, Config
from services.semcache.segment_files import SegmentFiles
from services.semcache.sqlite import SqliteDocuments
from tests.support.semcache import Parts, offer, query, running_cache

CONFIG = Config(exact_search_max=8, categories={"faq": CategoryConfig(mode=ReuseMode.SEMANTIC, quota_entries=5000)})


def asked(number: int) -> str:
    return f"topic word{number} detail{number * 7} of{number % 5}"


def answer(number: int) -> str:
    return f"answer {number}"


async def run(folder: Path, command: str, count: int) -> None:
    clock, log = MonotonicClock(), structlog.get_logger()
    async with SqliteDocuments.open(folder / "d.sqlite3", clock=clock, log=log, size_bytes_max=1 << 26) as documents:
        files = SegmentFiles(folder / "index", "words", log)
        rng = Random(int.from_bytes((folder / "seed").read_bytes()) + count)
        async with running_cache(clock, CONFIG, documents=documents, files=files, rng=rng) as parts:
            parts.store.check()
            if command == "fill":
                await fill(parts, count)
            else:
                await tell(parts, count)


async def fill(parts: Parts, count: int) -> None:
    """Offer numbers from `count` on on, eight at a time, with the upkeep beside."""
    numbers = iter(range(count, count + 2000))
    busy = 8

    async def worker() -> None:
        nonlocal busy
        for number in numbers:
            exact = b"%d" % number if number % 2 else b""
            reply = await parts.cache.offer(offer(query(asked(number), exact=exact), answer(number)), timeout_s=5.0)
            if reply.stored:
                say(f"stored {number}")
        busy -= 1

    async with anyio.create_task_group() as tg:
        for _ in range(8):
            tg.start_soon(worker)
        while busy:
            await parts.upkeep.once()
            await parts.upkeep.save()


async def tell(parts: Parts, count: int) -> None:
    """Say how many entries there are and what is answered to each number, by meaning and by key."""
    say(f"entries {len(parts.store)}")
    for number in range(count):
        for exact in (b"%d" % number, b""):
            reply = await parts.cache.lookup(query("" if exact else asked(number), exact=exact), timeout_s=5.0)
            if reply.answer is not None:
                say(f"{'exact' if exact else 'semantic'} {number} {reply.answer.text}")


def say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    structlog.configure(logger_factory=structlog.PrintLoggerFactory(sys.stderr))
    failpoint.arm(sys.argv[4] if len(sys.argv) > 4 else "")
    anyio.run(run, Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
