"""The GPU runner's tests run its kernels in Triton's interpreter, which `tests/conftest.py` chooses before anything
imports Triton. With TRITON_INTERPRET=0, on a machine with a GPU, those of whole steps run there instead.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import triton

collect_ignore = (
    []
    if triton.knobs.runtime.interpret
    else ["test_attention.py", "test_elementwise.py", "test_pages.py", "test_sampling.py", "test_device.py"]
)


def pytest_configure() -> None:
    if not (triton.knobs.runtime.interpret or torch.cuda.is_available()):
        raise pytest.UsageError("without a GPU these tests run under TRITON_INTERPRET=1")


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
