"""The GPU runner's tests run its kernels in Triton's interpreter, which `tests/conftest.py` chooses before anything
imports Triton.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import triton


def pytest_configure() -> None:
    if not triton.knobs.runtime.interpret:
        raise pytest.UsageError("these tests run under TRITON_INTERPRET=1")


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
