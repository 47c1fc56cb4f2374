"""Weights in the runner's own fused layout: converted once into a cached file that every process maps read-only."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import mmap
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import pad

from covey.errors import InvalidArgument, NoSpace

from .checkpoint import Checkpoint
from .config import ModelConfig
from .matrix import PANEL, Matrix, Precision, pack, packed_dtype, packed_shape
from .source import ModelSource

LAYOUT_VERSION = 2
"""Raised whenever the meaning of a byte in the cached file changes."""

_MAGIC = b"COVEYW\x00\x01"
_ALIGN = 64
_HEADER_LIMIT = 1 << 24
_TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "int8": torch.int8}
_TYPE_NAMES = {dtype: name for name, dtype in _TYPES.items()}


_PAIR = PANEL // 2
"""A panel of `gate_up` holds this many gates and then the values that they open."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerWeights:
    """One block of the decoder. `qkv` is fused along its outputs; `gate_up` interleaves 16 gates and 16 values."""

    attn_norm: torch.Tensor
    qkv: Matrix
    qkv_bias: torch.Tensor | None
    q_norm: torch.Tensor | None
    k_norm: torch.Tensor | None
    o: Matrix
    mlp_norm: torch.Tensor
    gate_up: Matrix
    down: Matrix


@dataclass(frozen=True, slots=True, kw_only=True)
class Weights:
    """A whole model over mapped memory. `embed` is [vocab, hidden] in fp32; `head` is packed even where it is tied."""

    embed: torch.Tensor
    layers: tuple[LayerWeights, ...]
    final_norm: torch.Tensor
    head: Matrix


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """The cached file, and whether this call made it."""

    path: Path
    converted: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class _Entry:
    """A tensor of the file: the checkpoint's `parts`, one above the other, of `shape` together."""

    name: str
    parts: tuple[str, ...]
    shape: tuple[int, ...]
    is_matrix: bool = False

    def sizes(self, precision: Precision) -> Iterator[tuple[str, tuple[int, ...], torch.dtype]]:
        """What lies in the file: names, shapes and types."""
        if not self.is_matrix:
            yield self.name, self.shape, torch.float32
            return
        outputs, inputs = self.shape
        yield self.name, packed_shape(outputs, inputs, precision), packed_dtype(precision)
        if precision == "int8":
            yield f"{self.name}:scale", (outputs,), torch.float32


def _entries(config: ModelConfig) -> Iterator[_Entry]:
    hidden, wide = config.hidden, config.intermediate
    q, kv = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
    yield _Entry(name="embed", parts=("embed",), shape=(config.vocab_size, hidden))
    for i in range(config.n_layers):
        yield _Entry(name=f"{i}.attn_norm", parts=(f"{i}.attn_norm",), shape=(hidden,))
        fused = (f"{i}.q", f"{i}.k", f"{i}.v")
        yield _Entry(name=f"{i}.qkv", parts=fused, shape=(q + 2 * kv, hidden), is_matrix=True)
        if config.qkv_bias:
            yield _Entry(name=f"{i}.qkv_bias", parts=tuple(f"{p}:bias" for p in fused), shape=(q + 2 * kv,))
        if config.qk_norm:
            yield _Entry(name=f"{i}.q_norm", parts=(f"{i}.q_norm",), shape=(config.head_dim,))
            yield _Entry(name=f"{i}.k_norm", parts=(f"{i}.k_norm",), shape=(config.head_dim,))
        yield _Entry(name=f"{i}.o", parts=(f"{i}.o",), shape=(hidden, q), is_matrix=True)
        yield _Entry(name=f"{i}.mlp_norm", parts=(f"{i}.mlp_norm",), shape=(hidden,))
        gate_up = (f"{i}.gate", f"{i}.up")
        yield _Entry(name=f"{i}.gate_up", parts=gate_up, shape=(2 * _paired(wide), hidden), is_matrix=True)
        yield _Entry(name=f"{i}.down", parts=(f"{i}.down",), shape=(hidden, wide), is_matrix=True)
    yield _Entry(name="final_norm", parts=("final_norm",), shape=(hidden,))
    head = "embed" if config.tied else "lm_head"
    yield _Entry(name="head", parts=(head,), shape=(config.vocab_size, hidden), is_matrix=True)


def _paired(width: int) -> int:
    return -(-width // _PAIR) * _PAIR


def prepare(source: ModelSource, config: ModelConfig, cache_dir: Path, precision: Precision = "fp32") -> Prepared:
    """Make sure that the cached file of `source` exists in `cache_dir`; of several processes at once, one converts.

    Raises InvalidArgument (field `model`) for a checkpoint that does not fit its config, NoSpace when the disk is full.
    """
    shape = hashlib.sha256(repr(config).encode()).hexdigest()[:8]
    path = cache_dir / f"{source.name}-{source.revision[:16]}-{shape}-v{LAYOUT_VERSION}-{precision}.weights"
    try:
        cache_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        if path.exists():
            return Prepared(path=path, converted=False)
        with _exclusive(path.with_suffix(".lock")):
            if path.exists():
                return Prepared(path=path, converted=False)
            _convert(Checkpoint(source, config), config, path, precision)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            need_mib = _layout(config, precision)[1] >> 20
            raise NoSpace(f"no space for the weight cache in {cache_dir}: it takes {need_mib} MiB") from error
        raise InvalidArgument(
            f"cannot write the weight cache {cache_dir}: {error.strerror}", field="cache_dir"
        ) from error
    return Prepared(path=path, converted=True)


@contextmanager
def _exclusive(path: Path) -> Iterator[None]:
    # The kernel drops the lock with its holder, so a killed converter blocks nobody.
    fd = os.open(path, os.O_CREAT | os.O_RDWR, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def _layout(config: ModelConfig, precision: Precision) -> tuple[dict[str, tuple[int, tuple[int, ...], str]], int]:
    """Where each tensor lies: name to (offset, shape, type); and the size of all, in bytes."""
    table: dict[str, tuple[int, tuple[int, ...], str]] = {}
    at = 0
    for entry in _entries(config):
        for name, shape, dtype in entry.sizes(precision):
            table[name] = (at, shape, _TYPE_NAMES[dtype])
            at += -(-torch.Size(shape).numel() * dtype.itemsize // _ALIGN) * _ALIGN
    return table, at


def _convert(checkpoint: Checkpoint, config: ModelConfig, path: Path, precision: Precision) -> None:
    table, size = _layout(config, precision)
    header = json.dumps({"size": size, "tensors": table}).encode()
    base = -(-(len(_MAGIC) + 8 + len(header)) // mmap.PAGESIZE) * mmap.PAGESIZE
    partial = path.with_suffix(".partial")
    try:
        fd = os.open(partial, os.O_CREAT | os.O_TRUNC | os.O_WRONLY, 0o600)
        with os.fdopen(fd, "wb") as file:
            file.write(_MAGIC + len(header).to_bytes(8, "little") + header)
            for entry in _entries(config):
                for name, tensor in _stored(checkpoint, entry, precision):
                    file.seek(base + table[name][0])
                    file.write(tensor.contiguous().view(torch.uint8).numpy().data)
            file.truncate(base + size)
            file.flush()
            os.fsync(file.fileno())
        partial.rename(path)
    finally:
        partial.unlink(missing_ok=True)


def _stored(checkpoint: Checkpoint, entry: _Entry, precision: Precision) -> Iterator[tuple[str, torch.Tensor]]:
    parts = [checkpoint.read(part) for part in entry.parts]
    fused = _interleave(*parts) if entry.name.endswith(".gate_up") else torch.cat(parts)
    if tuple(fused.shape) != entry.shape:
        raise InvalidArgument(f"{entry.name} has shape {tuple(fused.shape)}, not {entry.shape}", field="model")
    if not entry.is_matrix:
        yield entry.name, fused
        return
    packed = pack(fused, precision)
    yield entry.name, packed.data
    if packed.scale is not None:
        yield f"{entry.name}:scale", packed.scale


def _interleave(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """16 gates, their 16 values, the next 16 gates, …; padded with zeros."""
    halves = [pad(half, (0, 0, 0, -half.shape[0] % _PAIR)).view(-1, _PAIR, half.shape[1]) for half in (gate, up)]
    return torch.stack(halves, dim=1).flatten(0, 2)


def separate(gate_up: torch.Tensor, width: int, *, dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The first `width` gates and their values out of an interleaved dimension."""
    pairs = torch.unflatten(gate_up, dim, (-1, 2, _PAIR))
    gate, up = (pairs.select(dim + 1, half).flatten(dim, dim + 1).narrow(dim, 0, width) for half in (0, 1))
    return gate, up


def map_weights(path: Path, config: ModelConfig) -> Weights:
    """Map a file that `prepare` made; nothing is copied, the pages are shared with every other process.

    Raises InvalidArgument (field `cache_dir`) when the file is not one, or is cut short.
    """
    with path.open("rb") as file:
        if os.fstat(file.fileno()).st_size < mmap.PAGESIZE:
            raise InvalidArgument(f"{path} is not a weight cache; delete it", field="cache_dir")
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    size = int.from_bytes(data[8:16], "little")
    base = -(-(16 + size) // mmap.PAGESIZE) * mmap.PAGESIZE
    if data[:8] != _MAGIC or size > min(_HEADER_LIMIT, len(data)):
        raise InvalidArgument(f"{path} is not a weight cache; delete it", field="cache_dir")
    header = json.loads(data[16 : 16 + size])
    if len(data) != base + header["size"]:
        raise InvalidArgument(f"{path} is cut short; delete it", field="cache_dir")
    return _assemble(_views(data, base, header["tensors"]), config)


def _views(data: mmap.mmap, base: int, table: dict[str, Any]) -> dict[str, torch.Tensor]:
    views = {}
    with warnings.catch_warnings():
        # The mapping is read-only on purpose: a stray write faults instead of changing a weight.
        warnings.filterwarnings("ignore", message="The given buffer is not writable")
        for name, (offset, shape, dtype) in table.items():
            count = torch.Size(shape).numel()
            flat = torch.frombuffer(data, dtype=_TYPES[dtype], count=count, offset=base + offset)
            views[name] = flat.view(shape)
    return views


def _assemble(views: dict[str, torch.Tensor], config: ModelConfig) -> Weights:
    def matrix(entry: _Entry) -> Matrix:
        outputs, inputs = entry.shape
        scale = views.get(f"{entry.name}:scale")
        return Matrix(data=views[entry.name], scale=scale, outputs=outputs, inputs=inputs)

    matrices = {entry.name: matrix(entry) for entry in _entries(config) if entry.is_matrix}

    def layer(i: int) -> LayerWeights:
        return LayerWeights(
            attn_norm=views[f"{i}.attn_norm"],
            qkv=matrices[f"{i}.qkv"],
            qkv_bias=views.get(f"{i}.qkv_bias"),
            q_norm=views.get(f"{i}.q_norm"),
            k_norm=views.get(f"{i}.k_norm"),
            o=matrices[f"{i}.o"],
            mlp_norm=views[f"{i}.mlp_norm"],
            gate_up=matrices[f"{i}.gate_up"],
            down=matrices[f"{i}.down"],
        )

    return Weights(
        embed=views["embed"],
        layers=tuple(layer(i) for i in range(config.n_layers)),
        final_norm=views["final_norm"],
        head=matrices["head"],
    )
