"""The runner on a CPU: a model, its block pool and one step over a ragged batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from covey.errors import CoveyError, InvalidArgument

from .batch import fresh_block, row_error
from .config import ModelConfig
from .decoder import Decoder, Layers, Pass
from .layers import TorchLayers
from .loading import load
from .long import LongLayers, attend_for
from .matrix import Precision
from .native.layers import NativeLayers, supports
from .native.library import Library, find_library
from .plan import Floats, Interrupt, Row, RunnerInfo, StepOutcome, StepPlan
from .pool import KvDtype, KvPool
from .sampling import sample
from .share import CoreShare
from .source import ModelSource
from .weights import Weights

L = TypeVar("L", bound=Layers)

SCORE_CHUNK = 256
"""Tokens of a text that `score` runs at once."""


class TorchRunner:
    """`plan.Runner` on a CPU."""

    def __init__(
        self,
        info: RunnerInfo,
        config: ModelConfig,
        pool: KvPool,
        decoder: Decoder,
        long: Decoder,
        share: CoreShare | None,
    ) -> None:
        """`decoder` runs whole batches; `long`, over `LongLayers`, rows with keys elsewhere, one at a time."""
        self.info = info
        self._config = config
        self._share = share
        self._pool: KvPool | None = pool
        self._decoder: Decoder | None = decoder
        self._long: Decoder | None = long

    @property
    def kernels(self) -> str:
        """What computes: a build of the native kernels, or torch."""
        return self._open()[1].layers.name

    def step(self, plan: StepPlan, interrupt: Interrupt | None = None) -> StepOutcome:
        """See `plan.Runner.step`. Raises InvalidArgument when a sequence has two rows, or after `close`."""
        pool, decoder = self._open()
        good, failed = self._check(plan.rows, pool)
        if not good:
            return StepOutcome(failed=tuple(failed))
        if self._share is not None:
            self._share.begin(torch.set_num_threads)
        try:
            with torch.inference_mode():
                for row in good:
                    if not row.first_layer and (block := fresh_block(row, self.info.block_size)) is not None:
                        pool.clear(block)
                outcome = _run(
                    decoder, [r for r in good if not r.elsewhere], interrupt, StepOutcome(failed=tuple(failed))
                )
                for row in good:
                    if row.elsewhere is not None:
                        outcome = self._with_long(outcome, row, interrupt)
        finally:
            if self._share is not None:
                self._share.end()
        return outcome

    def attend(self, layer: int, blocks: tuple[int, ...], q: Floats) -> tuple[Floats, Floats]:
        """See `plan.ShardRunner.attend`."""
        return attend_for(self._open()[0], self._config, layer, blocks, q)

    @property
    def query_shape(self) -> tuple[int, int]:
        """See `plan.ShardRunner.query_shape`."""
        return self._config.n_heads, self._config.head_dim

    def drop(self, seq: int) -> None:
        """See `plan.Runner.drop`."""
        self._open()[1].drop(seq)
        if self._long is not None:
            self._long.drop(seq)

    def _with_long(self, others: StepOutcome, row: Row, interrupt: Interrupt | None) -> StepOutcome:
        """Run a row with keys elsewhere; it fails alone when those cannot be asked."""
        assert self._long is not None, "the runner is open"
        try:
            return _run(self._long, [row], interrupt, others)
        except CoveyError as error:
            self._long.drop(row.seq)
            return replace(others, failed=(*others.failed, (row.seq, error.message)))

    def score(self, tokens: Sequence[int], *, known: int = 0) -> NDArray[np.float64]:
        """The log probability of each token but the first, given those before it; overwrites the pool's first blocks.

        The first `known` tokens are not run: their keys and values are in those blocks. Of the others, the first one's
        probability is not known either. For measurements, on a runner that serves nobody.
        """
        pool, decoder = self._open()
        blocks = tuple(range(-(-len(tokens) // pool.geometry.block_size)))
        found = []
        with torch.inference_mode():
            for start in range(known, len(tokens) - 1, SCORE_CHUNK):
                piece = tuple(tokens[start : start + SCORE_CHUNK])
                hidden = decoder.run([Row(seq=0, tokens=piece, start=start, blocks=blocks)], None).hidden
                following = torch.tensor(tokens[start + 1 : start + 1 + SCORE_CHUNK])
                log_p = torch.log_softmax(decoder.layers.head(hidden)[: len(following)].double(), dim=-1)
                found.append(log_p.gather(1, following[:, None])[:, 0])
        return torch.cat(found).numpy()

    def wrap_layers(self, around: Callable[[Layers], L]) -> L:
        """Put something around what computes, for measurements; returns it."""
        decoder = self._open()[1]
        decoder.layers = wrapped = around(decoder.layers)
        return wrapped

    def block_view(self, block_id: int) -> memoryview:
        """See `plan.Runner.block_view`. Raises IndexError for a block outside the pool."""
        return self._open()[0].view(block_id)

    def close(self) -> None:
        """Drop the pool; its memory goes back once the last view is released."""
        self._pool = self._decoder = self._long = None

    def _open(self) -> tuple[KvPool, Decoder]:
        if self._pool is None or self._decoder is None:
            raise InvalidArgument("the runner is closed", field="runner")
        return self._pool, self._decoder

    def _check(self, rows: Sequence[Row], pool: KvPool) -> tuple[list[Row], list[tuple[int, str]]]:
        if len({row.seq for row in rows}) != len(rows):
            raise InvalidArgument("a sequence has two rows in one step", field="rows")
        ranges = {(row.first_layer, row.last_layer) for row in rows} - {(0, None), (0, self._config.n_layers)}
        if len(ranges) > 1:
            raise InvalidArgument("all rows with a range of layers share one", field="rows")
        good, failed = [], []
        for row in rows:
            error = row_error(row, pool=pool, context_limit=self.info.context_limit, vocab_size=self._config.vocab_size)
            if error is None:
                good.append(row)
            else:
                failed.append((row.seq, error))
        return good, failed


def _run(decoder: Decoder, rows: Sequence[Row], interrupt: Interrupt | None, before: StepOutcome) -> StepOutcome:
    """Run rows and draw from them; what was there `before` is in the outcome too."""
    if not rows:
        return before
    found = decoder.run(rows, interrupt)
    drawn, broken = sample(found.batch, *_finite(found), decoder.layers.head)
    return StepOutcome(
        sampled=(*before.sampled, *drawn),
        failed=(*before.failed, *found.failed, *broken),
        suspended=(*before.suspended, *found.suspended),
    )


def _finite(found: Pass) -> tuple[torch.Tensor, frozenset[int]]:
    """The hidden states, and the sequences in which any is not finite: each row is a sequence's own."""
    if found.batch is None:
        return found.hidden, frozenset()
    bad = (~torch.isfinite(found.hidden).all(dim=1)).nonzero()[:, 0].numpy()
    return found.hidden, frozenset(found.batch.rows[row].seq for row in found.batch.row_of[bad])


def open_runner(
    model: str | ModelSource,
    *,
    cache_dir: Path,
    n_blocks: int,
    block_size: int = 32,
    context_limit: int | None = None,
    share: CoreShare | None = None,
    precision: Precision = "fp32",
    kv_dtype: KvDtype | None = None,
    kernels: str | None = None,
) -> TorchRunner:
    """Load a model (see `loading.load`) for this CPU.

    `kernels` names a build of the native kernels, or `torch`; by default the best for this processor. Raises what
    `load` does, and InvalidArgument (`kernels`).
    """
    loaded = load(
        model,
        cache_dir=cache_dir,
        n_blocks=n_blocks,
        block_size=block_size,
        context_limit=context_limit,
        precision=precision,
        kv_dtype=kv_dtype,
    )
    pool = KvPool(loaded.geometry, n_blocks)
    layers = _layers(loaded.config, loaded.weights, pool, kernels)
    decoder = Decoder(loaded.config, loaded.weights, layers, block_size)
    long = Decoder(loaded.config, loaded.weights, LongLayers(loaded.config, loaded.weights, pool), block_size)
    return TorchRunner(loaded.info, loaded.config, pool, decoder, long, share)


def _layers(config: ModelConfig, weights: Weights, pool: KvPool, kernels: str | None) -> Layers:
    library: Library | None = None if kernels == "torch" else find_library(kernels)
    if library is None and kernels not in (None, "torch"):
        raise InvalidArgument(f"this machine has no kernels named {kernels!r}", field="kernels")
    if library is None or not supports(config, pool.geometry):
        return TorchLayers(config, weights, pool)
    return NativeLayers(config, weights, pool, library)
