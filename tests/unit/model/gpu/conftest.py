"""The GPU runner's tests run its kernels in Triton's interpreter, which must be chosen before Triton is imported."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator

import pytest

if "triton" in sys.modules and os.environ.get("TRITON_INTERPRET") != "1":
    raise RuntimeError("something imported triton before tests/unit/model/gpu, without its interpreter")
os.environ["TRITON_INTERPRET"] = "1"

import torch


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
