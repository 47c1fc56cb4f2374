"""A tiny model on the GPU runner, its kernels in the interpreter where that is on."""

from __future__ import annotations

from pathlib import Path

import triton

from covey.model.gpu.opening import open_gpu_runner
from covey.model.plan import Runner, RunnerInfo
from covey.model.pool import Geometry, KvDtype
from covey.model.source import resolve
from covey.model.weights import map_weights, prepare

DEVICE = "cpu" if triton.knobs.runtime.interpret else "cuda"


def open_tiny(
    folder: Path,
    cache_dir: Path,
    *,
    n_blocks: int = 64,
    block_size: int = 8,
    precision: str = "fp32",
    kv_dtype: KvDtype = "fp32",
    context_limit: int = 2048,
) -> Runner:
    source = resolve(str(folder))
    config = source.config()
    geometry = Geometry.of(config, block_size, kv_dtype)
    info = RunnerInfo(
        model=source.name,
        revision=source.revision,
        tokenizer_hash="-",
        block_size=block_size,
        block_bytes=geometry.block_bytes,
        n_blocks=n_blocks,
        context_limit=min(context_limit, config.context_limit),
        layout_fingerprint="-",
        precision=precision,
        kv_dtype=kv_dtype,
        eos_ids=config.eos_ids,
        n_layers=config.n_layers,
        vocab_size=config.vocab_size,
    )
    weights = map_weights(prepare(source, config, cache_dir).path, config)
    return open_gpu_runner(info, config, geometry, weights, device=DEVICE)
