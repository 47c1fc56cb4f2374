"""The CPU runner: a model, its block pool and one step over a ragged batch."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import torch

from covey.errors import InvalidArgument

from .batch import Batch, build_batch, row_error
from .config import ModelConfig
from .decoder import Decoder
from .plan import Draw, Row, RunnerInfo, Sampled, StepOutcome, StepPlan
from .pool import Geometry, KvPool
from .sampler import draw
from .share import CoreShare
from .source import ModelSource, resolve
from .tokenizer import open_tokenizer
from .weights import LAYOUT_VERSION, Weights, map_weights, prepare


class TorchRunner:
    """`plan.Runner` on torch and a CPU."""

    def __init__(
        self, info: RunnerInfo, config: ModelConfig, weights: Weights, pool: KvPool, share: CoreShare | None
    ) -> None:
        self.info = info
        self._config = config
        self._share = share
        self._pool: KvPool | None = pool
        self._decoder: Decoder | None = Decoder(config, weights, pool)

    def step(self, plan: StepPlan) -> StepOutcome:
        """See `plan.Runner.step`. Raises InvalidArgument when a sequence has two rows, or after `close`."""
        pool, decoder = self._open()
        good, failed = self._check(plan.rows, pool)
        if not good:
            return StepOutcome(failed=tuple(failed))
        if self._share is not None:
            self._share.begin(torch.set_num_threads)
        try:
            with torch.inference_mode():
                batch = build_batch(good, pool)
                for block in batch.fresh_blocks:
                    pool.clear(block)
                sampled, broken = _sample(decoder.forward(batch), batch)
        finally:
            if self._share is not None:
                self._share.end()
        return StepOutcome(sampled=tuple(sampled), failed=(*failed, *broken))

    def block_view(self, block_id: int) -> memoryview:
        """See `plan.Runner.block_view`. Raises IndexError for a block outside the pool."""
        return self._open()[0].view(block_id)

    def close(self) -> None:
        """Drop the pool; its memory goes back once the last view is released."""
        self._pool = self._decoder = None

    def _open(self) -> tuple[KvPool, Decoder]:
        if self._pool is None or self._decoder is None:
            raise InvalidArgument("the runner is closed", field="runner")
        return self._pool, self._decoder

    def _check(self, rows: Sequence[Row], pool: KvPool) -> tuple[list[Row], list[tuple[int, str]]]:
        if len({row.seq for row in rows}) != len(rows):
            raise InvalidArgument("a sequence has two rows in one step", field="rows")
        good, failed = [], []
        for row in rows:
            error = row_error(row, pool=pool, context_limit=self.info.context_limit, vocab_size=self._config.vocab_size)
            if error is None:
                good.append(row)
            else:
                failed.append((row.seq, error))
        return good, failed


def _sample(logits: torch.Tensor, batch: Batch) -> tuple[list[Sampled], list[tuple[int, str]]]:
    """Draw a token a row; a row whose best logit is not finite (NaN wins every comparison) fails by itself."""
    if not batch.samples:
        return [], []
    best, tokens = logits.max(dim=1)
    fine, greedy = torch.isfinite(best).tolist(), tokens.tolist()
    sampled: list[Sampled] = []
    failed: list[tuple[int, str]] = []
    for i, (seq, spec) in enumerate(batch.samples):
        if not fine[i]:
            failed.append((seq, "the model's logits are not finite"))
        elif spec.is_plain_greedy:
            sampled.append(Sampled(seq=seq, draws=(Draw(token=greedy[i]),)))
        else:
            sampled.append(Sampled(seq=seq, draws=(draw(logits[i].numpy(), spec),)))
    return sampled, failed


def open_runner(
    model: str | ModelSource,
    *,
    cache_dir: Path,
    n_blocks: int,
    block_size: int = 32,
    context_limit: int | None = None,
    share: CoreShare | None = None,
) -> TorchRunner:
    """Load a model (see `source.resolve`) with a pool of `n_blocks` blocks of `block_size` tokens.

    `cache_dir` keeps the converted weights; a first start converts for some seconds. `context_limit` can only lower the
    model's own. Raises InvalidArgument (`model`, `cache_dir`), DataCorrupt, NoSpace.
    """
    source = resolve(model) if isinstance(model, str) else model
    config = source.config()
    weights = map_weights(prepare(source, config, cache_dir).path, config)
    geometry = Geometry.of(config, block_size)
    info = RunnerInfo(
        model=source.name,
        revision=source.revision,
        tokenizer_hash=open_tokenizer(source).hash,
        block_size=block_size,
        block_bytes=geometry.block_bytes,
        n_blocks=n_blocks,
        context_limit=min(config.context_limit, context_limit or config.context_limit),
        layout_fingerprint=_fingerprint(geometry),
        precision="fp32",
        kv_dtype="fp32",
        eos_ids=config.eos_ids,
        n_layers=config.n_layers,
        vocab_size=config.vocab_size,
    )
    return TorchRunner(info, config, weights, KvPool(geometry, n_blocks), share)


def _fingerprint(geometry: Geometry) -> str:
    """Names the bytes of a block: two runners with the same one can exchange blocks."""
    text = f"lkhsd rotary-pairs v{LAYOUT_VERSION} {geometry!r} fp32 little-endian"
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
