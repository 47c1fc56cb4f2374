"""The layers of a decoder in the native kernels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from covey.model.batch import Batch
from covey.model.config import ModelConfig
from covey.model.matrix import GROUP, Matrix
from covey.model.pool import Geometry, KvPool
from covey.model.weights import LayerWeights, Weights

from . import library
from .library import Library

_KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2}
_POOL_KINDS = {"fp32": 0, "fp16": 1, "int8": 2}
_LARGEST = 256
_QUERIES = 24


def supports(config: ModelConfig, geometry: Geometry) -> bool:
    """Whether the kernels compute a model of this shape: heads and blocks are multiples of eight, at most 256."""
    sizes = (config.head_dim, geometry.block_size)
    return all(size % 8 == 0 and size <= _LARGEST for size in sizes) and config.n_heads // config.n_kv_heads <= _QUERIES


class NativeLayers:
    """`decoder.Layers` on one x86 machine. A row's results are the same bits whatever it is batched with."""

    def __init__(self, config: ModelConfig, weights: Weights, pool: KvPool, kernels: Library) -> None:
        self.name = kernels.name
        self._kernels = kernels
        self._keep = (weights, pool)  # their memory is used by address
        self._config = config
        self._layers = (library.Layer * config.n_layers)(*(_layer(layer) for layer in weights.layers))
        self._model = library.Model(
            layers=self._layers,
            final_norm=weights.final_norm.data_ptr(),
            head=_matrix(weights.head),
            hidden=config.hidden,
            heads=config.n_heads,
            eps=config.rms_eps,
        )
        self._pool = _pool(pool)
        self._room = _Room(config, weights)

    def forward(self, hidden: torch.Tensor, phases: torch.Tensor, batch: Batch, first: int, last: int) -> None:
        """See `decoder.Layers.forward`."""
        given = library.Batch(
            rows=len(batch.rows),
            tokens=hidden.shape[0],
            row_of=_address(batch.row_of),
            first=_address(batch.first),
            start=_address(batch.start),
            table_first=_address(batch.table_first),
            tables=_address(batch.tables),
            phases=phases.data_ptr(),
        )
        room = self._room.of(hidden.shape[0])
        self._kernels.forward(self._model, self._pool, given, room, hidden, first, last)

    def head(self, hidden: torch.Tensor) -> torch.Tensor:
        """See `decoder.Layers.head`."""
        logits = self._room.logits(hidden.shape[0])
        self._kernels.head(self._model, self._room.of(hidden.shape[0]), hidden, logits)
        return logits


class _Room:
    """Memory that grows to the largest step seen and is then reused, so that a step allocates nothing large."""

    def __init__(self, config: ModelConfig, weights: Weights) -> None:
        self._vocab = config.vocab_size
        layer = weights.layers[0]
        self._inputs = max(layer.qkv.inputs, layer.o.inputs, layer.down.inputs)
        self._outputs = max(layer.qkv.outputs, layer.gate_up.outputs // 2)
        self._attended = layer.o.inputs
        self._rows = 0
        self._buffers: tuple[torch.Tensor, ...] = ()
        self._logits = torch.empty(0)
        self._given = library.Room()

    def of(self, rows: int) -> library.Room:
        if rows > self._rows:
            groups = -(-self._inputs // GROUP)
            self._buffers = (
                torch.empty(rows * self._inputs),
                torch.empty(rows * groups * GROUP, dtype=torch.int8),
                torch.empty(rows * groups),
                torch.empty(rows * groups, dtype=torch.int32),
                torch.empty(rows * self._outputs),
                torch.empty(rows * self._attended),
            )
            values, bytes_, scales, sums, outputs, attended = (buffer.data_ptr() for buffer in self._buffers)
            packed = library.Packed(values=values, bytes=bytes_, scales=scales, sums=sums)
            self._given = library.Room(packed=packed, rows=outputs, attended=attended)
            self._rows = rows
        return self._given

    def logits(self, rows: int) -> torch.Tensor:
        if self._logits.numel() < rows * self._vocab:
            self._logits = torch.empty(rows * self._vocab)
        return self._logits[: rows * self._vocab].view(rows, self._vocab)


def _layer(layer: LayerWeights) -> library.Layer:
    return library.Layer(
        attn_norm=layer.attn_norm.data_ptr(),
        qkv=_matrix(layer.qkv, layer.qkv_bias),
        q_norm=_pointer(layer.q_norm),
        k_norm=_pointer(layer.k_norm),
        o=_matrix(layer.o),
        mlp_norm=layer.mlp_norm.data_ptr(),
        gate_up=_matrix(layer.gate_up),
        down=_matrix(layer.down),
    )


def _matrix(matrix: Matrix, bias: torch.Tensor | None = None) -> library.Matrix:
    return library.Matrix(
        data=matrix.data.data_ptr(),
        scale=_pointer(matrix.scale),
        bias=_pointer(bias),
        outputs=matrix.outputs,
        inputs=matrix.inputs,
        kind=_KINDS[matrix.data.dtype],
    )


def _pool(pool: KvPool) -> library.Pool:
    geometry = pool.geometry
    return library.Pool(
        data=pool.address,
        block_bytes=geometry.block_bytes,
        page_bytes=geometry.page_bytes,
        block_size=geometry.block_size,
        kv_heads=geometry.kv_heads,
        head_dim=geometry.head_dim,
        kind=_POOL_KINDS[geometry.kv_dtype],
    )


def _pointer(tensor: torch.Tensor | None) -> int | None:
    return None if tensor is None else int(tensor.data_ptr())


def _address(array: NDArray[Any] | Sequence[int]) -> int:
    return int(np.asarray(array).ctypes.data)
