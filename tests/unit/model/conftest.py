"""Models for the executor's tests: a tiny random Llama and, once a session, the packaged one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from covey.model.runner import TorchRunner, open_runner
from tests.support.tiny_llama import write_tiny_llama


@pytest.fixture(scope="session", autouse=True)
def _two_threads() -> None:
    torch.set_num_threads(2)


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("tiny") / "tiny-llama")


@pytest.fixture(scope="session")
def weight_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("weights")


@pytest.fixture
def tiny(tiny_folder: Path, weight_cache: Path) -> Iterator[TorchRunner]:
    runner = open_runner(str(tiny_folder), cache_dir=weight_cache, n_blocks=64, block_size=8)
    yield runner
    runner.close()


@pytest.fixture(scope="session")
def smollm2(packaged_cache: Path) -> Iterator[TorchRunner]:
    runner = open_runner("smollm2", cache_dir=packaged_cache, n_blocks=40)
    yield runner
    runner.close()
