"""CUDA graphs of decode steps, by batch bucket. No GPU has run this file's capture and replay yet; see docs/gpu.md."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from .batch import GpuBatch
from .decoder import GpuDecoder

MAX_ROWS = 256
"""Rows of the largest bucket; larger decode steps run without a graph."""


def bucket_of(count: int) -> int:
    """The power of two that holds a count."""
    return 1 << (max(count, 1) - 1).bit_length()


class StaticDecode:
    """Index tensors that keep their addresses: a batch of single tokens is copied in, padded with rows of no context
    that store nothing.
    """

    def __init__(self, max_rows: int, max_blocks: int, device: torch.device) -> None:
        def zeros(*shape: int) -> torch.Tensor:
            return torch.zeros(shape, dtype=torch.int32, device=device)

        self._tokens, self._positions, self._contexts = zeros(max_rows), zeros(max_rows), zeros(max_rows)
        self._slots = zeros(max_rows)
        self._tables = zeros(max_rows, max_blocks)

    def padded(self, rows: int, n_splits: int) -> GpuBatch:
        """The batch of a bucket: views of the static tensors."""
        return GpuBatch(
            rows=(),
            firsts=(),
            tokens=self._tokens[:rows],
            positions=self._positions[:rows],
            slots=self._slots[:rows],
            n_singles=rows,
            tables=self._tables[:rows],
            contexts=self._contexts[:rows],
            n_splits=n_splits,
            chunks=None,
        )

    def load(self, batch: GpuBatch, rows: int) -> None:
        """Copy a batch of single tokens into the first rows of a bucket of `rows`."""
        n = batch.n_singles
        for target, source, padding in (
            (self._tokens, batch.tokens, 0),
            (self._positions, batch.positions, 0),
            (self._slots, batch.slots, -1),
            (self._contexts, batch.contexts, 0),
        ):
            target[:n].copy_(source)
            target[n:rows].fill_(padding)
        self._tables[:n, : batch.tables.shape[1]].copy_(batch.tables)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Captured:
    graph: Any
    logits: torch.Tensor


class DecodeGraphs:
    """A graph for each bucket (rows, stretches of context), captured when it is first needed; they share memory."""

    def __init__(self, decoder: GpuDecoder, max_blocks: int, device: torch.device) -> None:
        self._decoder = decoder
        self._static = StaticDecode(MAX_ROWS, max_blocks, device)
        self._captured: dict[tuple[int, int], _Captured] = {}
        self._memory: Any = None

    def logits(self, batch: GpuBatch) -> torch.Tensor:
        """Logits [row, vocab] of at most `MAX_ROWS` single tokens; valid until the next call."""
        rows, n_splits = bucket_of(batch.n_singles), bucket_of(batch.n_splits)
        self._static.load(batch, rows)
        captured = self._captured.get((rows, n_splits))
        if captured is None:
            captured = self._captured[rows, n_splits] = self._capture(rows, n_splits)
        captured.graph.replay()
        return captured.logits[: batch.n_singles]

    def _capture(self, rows: int, n_splits: int) -> _Captured:
        batch = self._static.padded(rows, n_splits)
        # Kernels compile, and cuBLAS takes its workspace, at the first run: on a side stream, before the capture. The
        # run stores this step's keys and values, which the replay stores once more.
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self._decoder.decode(batch)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._memory):
            logits = self._decoder.decode(batch)
        self._memory = graph.pool()
        return _Captured(graph=graph, logits=logits)
