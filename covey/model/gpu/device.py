"""Finds the device to run on, or says what to install."""

from __future__ import annotations

import importlib.util

import torch

from covey.errors import InvalidArgument

FIELD = "engine.device"
"""The setting that names the device."""


def find_device(name: str) -> torch.device:
    """The torch device of `cuda`, `cuda:1`, or `cpu` (kernels in Triton's interpreter: for tests only).

    Raises InvalidArgument (field `engine.device`) where Triton or a usable GPU is missing.
    """
    if importlib.util.find_spec("triton") is None:
        raise InvalidArgument(f"device {name!r} needs Triton: pip install 'covey[gpu]', or set cpu", field=FIELD)
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise InvalidArgument(f"device {name!r} is not one that torch knows", field=FIELD) from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise InvalidArgument(
            f"device {name!r}: torch {torch.__version__} sees no NVIDIA GPU; install its driver and a CUDA build",
            field=FIELD,
        )
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise InvalidArgument(f"device {name!r}: there are {torch.cuda.device_count()} GPUs", field=FIELD)
    if device.type not in ("cuda", "cpu"):
        raise InvalidArgument(f"device {name!r} is neither cuda nor cpu", field=FIELD)
    return device
