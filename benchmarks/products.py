"""The bare products of a model: every weight matrix streamed once, in the fastest code there is on this machine."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import median

import torch

from benchmarks import isa
from covey.clock import Clock
from covey.model.config import ModelConfig
from covey.model.matrix import GROUP, Matrix, Precision, pack
from covey.model.native import library

REPEATS, FEW_ROWS = 3, 32
HEAD = "head"
_KINDS = {"fp32": 0, "bf16": 1, "int8": 2}

Product = Callable[[torch.Tensor], object]
"""Multiplies some rows of activations by one matrix."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """A matrix of a model: what it is called there, and its size."""

    kind: str
    outputs: int
    inputs: int


def shapes(config: ModelConfig) -> Iterator[Shape]:
    """All matrices in the order of a forward pass."""
    q, kv = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
    for _ in range(config.n_layers):
        yield Shape(kind="qkv", outputs=q + 2 * kv, inputs=config.hidden)
        yield Shape(kind="o", outputs=config.hidden, inputs=q)
        yield Shape(kind="gate_up", outputs=2 * config.intermediate, inputs=config.hidden)
        yield Shape(kind="down", outputs=config.hidden, inputs=config.intermediate)
    yield Shape(kind=HEAD, outputs=config.vocab_size, inputs=config.hidden)


class Products:
    """The matrices of a model's shape, filled with random numbers, in every code that multiplies by them."""

    def __init__(self, config: ModelConfig, precision: Precision, clock: Clock) -> None:
        self._shapes, self._clock = tuple(shapes(config)), clock
        self._codes = codes(self._shapes, precision)

    @property
    def names(self) -> tuple[str, ...]:
        """The codes there are."""
        return tuple(self._codes)

    def seconds(self, rows: int, sampled: int) -> dict[str, float]:
        """Seconds of a pass of `rows` tokens, `sampled` of them through the head: of each code, and of the `fastest`,
        which for each kind of matrix is whichever code is.
        """
        widths = {shape.inputs for shape in self._shapes}
        inputs = {(width, count): torch.randn(count, width) for width in widths for count in (rows, sampled)}
        by_code = {name: self._median_by_kind(code, inputs, rows, sampled) for name, code in self._codes.items()}
        fastest = {kind: min(times[kind] for times in by_code.values()) for kind in {s.kind for s in self._shapes}}
        return {name: sum(times.values()) for name, times in by_code.items()} | {"fastest": sum(fastest.values())}

    def _median_by_kind(
        self, code: Sequence[Product], inputs: Mapping[tuple[int, int], torch.Tensor], rows: int, sampled: int
    ) -> dict[str, float]:
        repeats = REPEATS if rows <= FEW_ROWS else 1
        passes = [self._pass(code, inputs, rows, sampled) for _ in range(repeats)]
        return {kind: median(times[kind] for times in passes) for kind in passes[0]}

    def _pass(
        self, code: Sequence[Product], inputs: Mapping[tuple[int, int], torch.Tensor], rows: int, sampled: int
    ) -> dict[str, float]:
        """Seconds by kind, in the order of a forward pass: no matrix is still in a cache when its turn comes again."""
        times: dict[str, float] = {}
        for shape, product in zip(self._shapes, code, strict=True):
            x = inputs[shape.inputs, sampled if shape.kind == HEAD else rows]
            began = self._clock.now()
            product(x)
            times[shape.kind] = times.get(shape.kind, 0.0) + self._clock.now() - began
        return times


def codes(all_shapes: Sequence[Shape], precision: Precision) -> dict[str, list[Product]]:
    """Each code's products, one a shape. torch has none that computes int8 as we do."""
    weights = [torch.randn(shape.outputs, shape.inputs) for shape in all_shapes]
    found: dict[str, list[Product]] = {}
    room = Room()
    if precision != "int8":
        dtype = torch.float32 if precision == "fp32" else torch.bfloat16
        kept = [weight.to(dtype) for weight in weights]
        found["torch_rows"] = [_torch_rows(weight, room) for weight in kept]
        found["torch_columns"] = [_torch_columns(weight, room) for weight in kept]
    kernels = library.find_library(isa.asked())
    if kernels is not None:
        found["covey"] = [_native(kernels, pack(weight, precision), precision, room) for weight in weights]
    return found


def _torch_rows(weight: torch.Tensor, room: Room) -> Product:
    def run(x: torch.Tensor) -> None:
        torch.mm(x.to(weight.dtype), weight.t(), out=room.result(x.shape[0], weight.shape[0], weight.dtype))

    return run


def _torch_columns(weight: torch.Tensor, room: Room) -> Product:
    def run(x: torch.Tensor) -> None:
        torch.mm(weight, x.to(weight.dtype).t(), out=room.result(weight.shape[0], x.shape[0], weight.dtype))

    return run


def _native(kernels: library.Library, matrix: Matrix, precision: Precision, room: Room) -> Product:
    def run(x: torch.Tensor) -> None:
        given = library.Matrix(
            data=matrix.data.data_ptr(),
            scale=None if matrix.scale is None else matrix.scale.data_ptr(),
            outputs=matrix.outputs,
            inputs=matrix.inputs,
            kind=_KINDS[precision],
        )
        rows = x.shape[0]
        kernels.product(given, room.packing(rows, matrix.inputs), x, room.result(rows, matrix.outputs, x.dtype))

    return run


class Room:
    """Results and workspaces that products of one size share, as the layers of a runner do."""

    def __init__(self) -> None:
        self._results: dict[tuple[int, int, torch.dtype], torch.Tensor] = {}
        self._packings: dict[tuple[int, int], tuple[library.Room, tuple[torch.Tensor, ...]]] = {}

    def result(self, rows: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
        """Where a product goes."""
        key = (rows, columns, dtype)
        if key not in self._results:
            self._results[key] = torch.empty(rows, columns, dtype=dtype)
        return self._results[key]

    def packing(self, rows: int, inputs: int) -> library.Room:
        """Where a native kernel puts its activations in order."""
        if (rows, inputs) not in self._packings:
            groups = -(-inputs // GROUP)
            buffers = (
                torch.empty(rows * inputs),
                torch.empty(rows * groups * GROUP, dtype=torch.int8),
                torch.empty(rows * groups),
                torch.empty(rows * groups, dtype=torch.int32),
            )
            values, bytes_, scales, sums = (buffer.data_ptr() for buffer in buffers)
            packed = library.Packed(values=values, bytes=bytes_, scales=scales, sums=sums)
            self._packings[rows, inputs] = library.Room(packed=packed), buffers
        return self._packings[rows, inputs][0]
