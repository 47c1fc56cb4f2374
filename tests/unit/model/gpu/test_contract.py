"""The contract suite of runners, on the GPU runner with its kernels in the interpreter."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from covey.model.plan import Runner
from tests.contract.test_runner import *  # noqa: F403 - the suite itself
from tests.contract.test_runner import LAYERS
from tests.support.tiny_llama import write_tiny_llama

from .opened import open_interpreted


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("gpu") / "tiny", n_layers=LAYERS, hidden=32, n_heads=2, n_kv_heads=1)


@pytest.fixture
def runner(folder: Path) -> Iterator[Runner]:
    made = open_interpreted(folder, folder.parent / "cache")
    yield made
    made.close()
