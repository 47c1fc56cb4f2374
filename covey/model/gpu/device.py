"""Finds the device to run on, or says what to install."""

from __future__ import annotations

import importlib.util

import torch

from covey.errors import InvalidArgument

FIELD = "engine.device"
"""The setting that names the device."""


def find_device(name: str) -> torch.device:
    """The torch device of `cuda`, or of `cpu`: there the kernels run in Triton's interpreter, for tests.

    Of several GPUs it is the first that the process sees. Raises InvalidArgument (field `engine.device`) where Triton
    or a usable GPU is missing.
    """
    if name not in ("cuda", "cpu"):
        raise InvalidArgument(f"device {name!r} is neither cuda nor cpu", field=FIELD)
    if importlib.util.find_spec("triton") is None:
        raise InvalidArgument(f"device {name!r} needs Triton: pip install 'covey[gpu]', or set cpu", field=FIELD)
    if name == "cuda" and not torch.cuda.is_available():
        raise InvalidArgument(
            f"device {name!r}: torch {torch.__version__} sees no NVIDIA GPU; install its driver and a CUDA build",
            field=FIELD,
        )
    return torch.device(name)
