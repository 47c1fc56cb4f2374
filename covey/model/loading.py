"""Loads a model for any device: its shape, its mapped weights, and what it announces."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from .config import ModelConfig
from .matrix import Precision
from .plan import RunnerInfo
from .pool import AUTO, Geometry, KvDtype
from .source import ModelSource, resolve
from .tokenizer import open_tokenizer
from .weights import LAYOUT_VERSION, Weights, map_weights, prepare


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    """All that a runner is made of, but its pool."""

    info: RunnerInfo
    config: ModelConfig
    geometry: Geometry
    weights: Weights


def load(
    model: str | ModelSource,
    *,
    cache_dir: Path,
    n_blocks: int,
    block_size: int = 32,
    context_limit: int | None = None,
    precision: Precision = "fp32",
    kv_dtype: KvDtype | None = None,
) -> Loaded:
    """Load a model (see `source.resolve`) for a pool of `n_blocks` blocks of `block_size` tokens.

    `cache_dir` keeps the converted weights; a first start converts for some seconds. `context_limit` can only lower the
    model's own; `kv_dtype` follows `precision` by default (`pool.AUTO`). Raises InvalidArgument (`model`, `cache_dir`),
    DataCorrupt, NoSpace.
    """
    source = resolve(model) if isinstance(model, str) else model
    config = source.config()
    weights = map_weights(prepare(source, config, cache_dir, precision).path, config)
    geometry = Geometry.of(config, block_size, kv_dtype or AUTO[precision])
    info = RunnerInfo(
        model=source.name,
        revision=source.revision,
        tokenizer_hash=open_tokenizer(source).hash,
        block_size=block_size,
        block_bytes=geometry.block_bytes,
        n_blocks=n_blocks,
        context_limit=min(config.context_limit, context_limit or config.context_limit),
        layout_fingerprint=_fingerprint(geometry),
        precision=precision,
        kv_dtype=geometry.kv_dtype,
        eos_ids=config.eos_ids,
        n_layers=config.n_layers,
        vocab_size=config.vocab_size,
        kv_heads=geometry.kv_heads,
        head_dim=geometry.head_dim,
    )
    return Loaded(info=info, config=config, geometry=geometry, weights=weights)


def _fingerprint(geometry: Geometry) -> str:
    """Names the bytes of a block: two runners with the same one can exchange blocks."""
    text = f"lkh transposed-keys rotary-pairs v{LAYOUT_VERSION} {geometry!r} little-endian"
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
