"""Real kvstore processes: one shared by a module, and fresh ones for tests that harm theirs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.contract.kv_stores import StoreProcess, store_process


@pytest.fixture(scope="module")
def process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StoreProcess]:
    with store_process(tmp_path_factory.mktemp("kvstore"), "capacity_bytes=134217728") as process:
        yield process


@pytest.fixture
def fresh(tmp_path: Path) -> Iterator[StoreProcess]:
    with store_process(tmp_path) as process:
        yield process


@pytest.fixture(params=["auto", "grpc"])
def transport(request: pytest.FixtureRequest) -> str:
    return str(request.param)
