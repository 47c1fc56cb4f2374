"""One real mesh for all tests of this folder; it logs all that it would ever log."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from covey.cli.mesh import Mesh
from tests.support.probe import mesh_in_thread

ROLES = ("gateway", "agentflow", "prefill", "decode", "kvstore", "semcache")


@pytest.fixture(scope="package")
def mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mesh]:
    settings = tuple(f"{role}.log_level=debug" for role in ROLES)
    with mesh_in_thread(tmp_path_factory.mktemp("security"), settings=settings) as mesh:
        yield mesh


@pytest.fixture(autouse=True)
def _no_blocking() -> None:
    """Off: a test's process only watches here, and grpc's channels lock when they are collected."""
