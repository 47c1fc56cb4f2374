"""What is said where a GPU, or Triton, is missing; and blocks of the device seen from the host."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from covey.errors import InvalidArgument
from covey.model.gpu.device import find_device
from covey.model.gpu.host_windows import HostWindows
from covey.model.gpu.pages import DevicePool

from .pools import CPU, layout


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_cuda_is_refused_with_what_to_do() -> None:
    with pytest.raises(InvalidArgument, match="no NVIDIA GPU; install") as caught:
        find_device("cuda")
    assert caught.value.field == "engine.device"


@pytest.mark.parametrize("name", ["tpu!", "mps", "cuda:1"])
def test_other_devices_are_refused(name: str) -> None:
    with pytest.raises(InvalidArgument, match=name):
        find_device(name)


def test_without_triton_any_device_is_refused_with_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: None)
    with pytest.raises(InvalidArgument, match=r"pip install 'covey\[gpu\]'"):
        find_device("cuda")


def test_neither_the_cpu_runner_nor_the_opening_imports_triton() -> None:
    code = "import sys, covey.model.runner, covey.model.gpu.opening; print('triton' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


@pytest.mark.timeout(400)
@pytest.mark.parametrize("capability", [pytest.param("80", marks=pytest.mark.slow), "90"])
def test_every_kernel_compiles_to_machine_code(capability: str, tmp_path: Path) -> None:
    """Ampere and Hopper; the compiler and assembler come with Triton and need no GPU."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {
        "TRITON_CACHE_DIR": str(tmp_path),
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-m", "tests.unit.model.gpu.compile_kernels", capability]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    lines = [line.split() for line in done.stdout.splitlines()]
    assert {name for name, _ in lines} == {
        "_decode_kernel",
        "_dequantise_kernel",
        "_draw_kernel",
        "_gather_kernel",
        "_merge_kernel",
        "_norm_kernel",
        "_prefill_kernel",
        "_quantise_kernel",
        "_rotary_kernel",
        "_scatter_kernel",
    }
    assert max(int(shared) for _, shared in lines) <= 100 << 10, "bytes of shared memory that every GPU since 8.0 has"


def test_a_window_is_written_back_once_and_closes_with_its_last_view() -> None:
    pool = DevicePool(layout(), 3, CPU)
    windows = HostWindows(pool)
    first, second = windows.view(1), windows.view(1)
    first[0] = 7
    assert second[0] == 7
    assert int(pool.blocks[1, 0]) == 0
    windows.write_back()
    assert int(pool.blocks[1, 0]) == 7
    first.release()
    windows.write_back()
    assert windows.open_count == 1
    pool.blocks[1, 0] = 9  # a step writes
    windows.refresh([0, 1])
    assert second[0] == 9
    second.release()
    windows.write_back()
    assert windows.open_count == 0
    assert int(pool.blocks[1, 0]) == 9
    with windows.view(1) as third:
        assert third[0] == 9
    with pytest.raises(IndexError, match="block 3"):
        windows.view(3)
