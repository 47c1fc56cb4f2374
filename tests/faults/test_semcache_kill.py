"""semcache killed with -9 while it inserts, swaps generations and saves: each acknowledged entry is served again."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import anyio
import pytest

from covey.failpoint import CRASH_EXIT_CODE
from tests.support.semcache_child import answer

pytestmark = [pytest.mark.faults, pytest.mark.slow]

ROUNDS = 30 if os.environ.get("COVEY_SOAK") else 1
NUMBERS = 2000


async def child(folder: Path, command: str, number: int, failpoints: str = "") -> tuple[int, list[str]]:
    script = [sys.executable, "-P", "-m", "tests.support.semcache_child", str(folder), command, str(number), failpoints]
    environment = os.environ | {"PYTHONPATH": str(Path.cwd()), "OMP_NUM_THREADS": "1"}
    with anyio.fail_after(60):
        done = await anyio.run_process(script, check=False, env=environment, stderr=None)
    lines = done.stdout.decode().split("\n")
    return done.returncode, [line for line in lines[:-1] if line]  # a line cut off by the kill was not said


@pytest.mark.parametrize(
    "point",
    ["semcache.put", "semcache.commit", "semcache.file", "semcache.swap", "semcache.save", "semcache.manifest"],
)
async def test_a_kill_loses_nothing_acknowledged_and_invents_nothing(tmp_path: Path, point: str) -> None:
    (tmp_path / "seed").write_bytes(b"\x05")
    stored: set[int] = set()
    for turn in range(ROUNDS):
        hits = 40 if point in ("semcache.put", "semcache.file") else 3 + turn
        code, lines = await child(tmp_path, "fill", turn * NUMBERS, f"{point}=crash@{hits}")
        assert code == CRASH_EXIT_CODE
        stored |= {int(line.split()[1]) for line in lines}
        assert stored, "it was killed before anything was acknowledged"
        code, lines = await child(tmp_path, "tell", (turn + 1) * NUMBERS)
        assert code == 0
        count = int(lines[0].split()[1])
        told = [line.split(maxsplit=2) for line in lines[1:]]
        assert all(text == answer(int(number)) for _, number, text in told), "an answer to something else"
        by_meaning = {int(number) for kind, number, _ in told if kind == "semantic"}
        by_key = {int(number) for kind, number, _ in told if kind == "exact"}
        assert stored <= by_meaning
        assert {number for number in stored if number % 2} <= by_key
        assert by_key <= by_meaning
        assert count == len(by_meaning), "an entry that nobody offered"
