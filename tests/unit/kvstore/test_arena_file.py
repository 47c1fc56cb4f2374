"""The arena's file: private, gone with its owner however that dies, never larger than its file system."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from covey.config import ConfigError
from services.kvstore.arena_file import arena_file, choose_directory, clear_stale

HOLD = """
import sys, pathlib
from services.kvstore.arena_file import arena_file
with arena_file(pathlib.Path(sys.argv[1]), "other", 1 << 20):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_an_arena_is_private_sparse_and_removed_on_exit(tmp_path: Path) -> None:
    with arena_file(tmp_path, "kv/0", 1 << 24) as arena:
        stat = arena.path.stat()
        assert stat.st_mode & 0o777 == 0o600
        assert arena.probe_path.stat().st_mode & 0o777 == 0o600
        assert arena.probe_path.read_text() == arena.probe_nonce
        assert (stat.st_size, stat.st_blocks) == (1 << 24, 0)
        arena.back(1 << 20, 1 << 20)
        assert arena.path.stat().st_blocks * 512 == 1 << 20
        assert arena.is_backed(1 << 20, 1 << 20)
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]


def test_a_killed_owner_leaves_nothing_that_the_next_start_does_not_clear(tmp_path: Path) -> None:
    owner = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert owner.stdout is not None
        assert owner.stdout.readline() == b"held\n"
        assert clear_stale(tmp_path) == 0, "the owner lives"
    finally:
        os.kill(owner.pid, signal.SIGKILL)
        owner.communicate()
    assert len(list(tmp_path.glob("other.*"))) == 2
    with arena_file(tmp_path, "mine", 1 << 20):
        assert list(tmp_path.glob("other.*")) == []
        assert clear_stale(tmp_path) == 0, "one's own arena is not stale"


def test_an_arena_that_does_not_fit_is_refused_at_start(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        choose_directory(str(tmp_path), tmp_path, 1 << 60)
    assert caught.value.field == "capacity_bytes"
    assert choose_directory(str(tmp_path / "new"), tmp_path, 1 << 20) == (tmp_path / "new").resolve()
    assert (tmp_path / "new").stat().st_mode & 0o777 == 0o700
