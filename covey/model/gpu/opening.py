"""Opens a loaded model on a GPU."""

from __future__ import annotations

from covey.errors import InvalidArgument
from covey.model.config import ModelConfig
from covey.model.plan import Runner, RunnerInfo
from covey.model.pool import Geometry
from covey.model.weights import Weights

from .device import find_device

GPU_PRECISIONS = ("fp32", "bf16")
"""What products can run in on a GPU."""


def open_gpu_runner(
    info: RunnerInfo, config: ModelConfig, geometry: Geometry, weights: Weights, *, device: str = "cuda"
) -> Runner:
    """Copy `weights` to `device` and make a pool of `info.n_blocks` blocks of `geometry` there.

    `info` says what it serves, as on a CPU: products run in its `precision`, fp32 or bf16. Blocks have the layout of
    the CPU's, so both kinds of runner exchange them. Raises InvalidArgument (`engine.device`, `engine.precision`,
    `engine.block_size`) and NoSpace.
    """
    place = find_device(device)
    if info.precision not in GPU_PRECISIONS:
        raise InvalidArgument(
            f"precision {info.precision!r} does not run on a GPU; use {' or '.join(GPU_PRECISIONS)}",
            field="engine.precision",
        )
    # Only now: these import Triton, which a machine without a GPU need not have.
    from .pages import DevicePool
    from .runner import GpuRunner
    from .weights import to_device

    pool = DevicePool(geometry, info.n_blocks, place)
    return GpuRunner(info, config, to_device(weights, config, place, info.precision), pool, place)
