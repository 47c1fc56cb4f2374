"""The native kernels: found beside this file when the build made them for this processor."""

from __future__ import annotations

import ctypes
from ctypes import POINTER, Structure, byref, c_float, c_int32, c_int64, c_void_p
from functools import cache
from pathlib import Path

import torch  # its OpenMP library must be loaded before ours asks for one

FOLDER = Path(__file__).parent / "lib"

BUILDS = {
    "avx512": ("avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512cd", "avx512_vnni", "f16c", "fma"),
    "avx2": ("avx2", "fma", "f16c"),
}
"""Each build and what a processor must be able to do for it, best first."""


class Matrix(Structure):
    """`Matrix` of product.h."""

    _fields_ = (
        ("data", c_void_p),
        ("scale", c_void_p),
        ("bias", c_void_p),
        ("outputs", c_int64),
        ("inputs", c_int64),
        ("kind", c_int32),
    )


class Packed(Structure):
    """`Packed` of product.h."""

    _fields_ = tuple((name, c_void_p) for name in ("values", "bytes", "scales", "sums"))


class Room(Structure):
    """`Room` of forward.cpp."""

    _fields_ = (("packed", Packed), ("rows", c_void_p), ("attended", c_void_p))


class Layer(Structure):
    """`Layer` of forward.cpp."""

    _fields_ = (
        ("attn_norm", c_void_p),
        ("qkv", Matrix),
        ("q_norm", c_void_p),
        ("k_norm", c_void_p),
        ("o", Matrix),
        ("mlp_norm", c_void_p),
        ("gate_up", Matrix),
        ("down", Matrix),
    )


class Model(Structure):
    """`Model` of forward.cpp."""

    _fields_ = (
        ("layers", POINTER(Layer)),
        ("final_norm", c_void_p),
        ("head", Matrix),
        ("hidden", c_int32),
        ("heads", c_int32),
        ("eps", c_float),
    )


class Pool(Structure):
    """`Pool` of attention.h."""

    _fields_ = (
        ("data", c_void_p),
        ("block_bytes", c_int64),
        ("page_bytes", c_int64),
        ("block_size", c_int32),
        ("kv_heads", c_int32),
        ("head_dim", c_int32),
        ("kind", c_int32),
    )


class Batch(Structure):
    """`Batch` of attention.h."""

    _fields_ = (
        ("rows", c_int64),
        ("tokens", c_int64),
        *((name, c_void_p) for name in ("row_of", "first", "start", "table_first", "tables", "phases")),
    )


class Library:
    """The functions of forward.cpp. Each computes on as many threads as torch is set to."""

    def __init__(self, path: Path) -> None:
        self._library = ctypes.CDLL(str(path))
        self.name = path.stem

    def forward(
        self, model: Model, pool: Pool, batch: Batch, room: Room, hidden: torch.Tensor, first: int, last: int
    ) -> None:
        """Run layers `first` up to, not including, `last` over `hidden` [token, hidden] in place."""
        self._library.covey_forward(
            byref(model), byref(pool), byref(batch), byref(room), c_void_p(hidden.data_ptr()), first, last, _threads()
        )

    def head(self, model: Model, room: Room, hidden: torch.Tensor, logits: torch.Tensor) -> None:
        """Fill `logits` [row, vocab] from the last layer's `hidden` [row, hidden]."""
        rows = c_int64(hidden.shape[0])
        hidden_at, logits_at = c_void_p(hidden.data_ptr()), c_void_p(logits.data_ptr())
        self._library.covey_head(byref(model), byref(room), hidden_at, rows, logits_at, _threads())

    def product(self, matrix: Matrix, room: Room, x: torch.Tensor, out: torch.Tensor) -> None:
        """Fill `out` [row, outputs] with `x` [row, inputs] times the transposed matrix."""
        rows = c_int64(x.shape[0])
        self._library.covey_product(
            byref(matrix), byref(room), c_void_p(x.data_ptr()), rows, c_void_p(out.data_ptr()), _threads()
        )


def _threads() -> int:
    return int(torch.get_num_threads())


@cache
def find_library(build: str | None = None) -> Library | None:
    """The best build for this processor, or the named one; None where there is none, and torch computes instead."""
    able = processor_flags()
    for name, needs in BUILDS.items():
        path = FOLDER / f"{name}.so"
        if build in (None, name) and able.issuperset(needs) and path.exists():
            return Library(path)
    return None


@cache
def processor_flags() -> frozenset[str]:
    """What this processor can do, as Linux names it; empty elsewhere."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return frozenset()
    return frozenset(next((line.split(":", 1)[1].split() for line in lines if line.startswith("flags")), ()))
