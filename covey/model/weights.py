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

from covey.errors import InvalidArgument, NoSpace

from .checkpoint import Checkpoint
from .config import ModelConfig
from .source import ModelSource

LAYOUT_VERSION = 1
"""Raised whenever the meaning of a byte in the cached file changes."""

_MAGIC = b"COVEYW\x00\x01"
_ALIGN = 64
_HEADER_LIMIT = 1 << 24


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerWeights:
    """One block of the decoder. Matrices are [out, in]; `qkv` and `gate_up` are fused along `out`."""

    attn_norm: torch.Tensor
    qkv: torch.Tensor
    qkv_bias: torch.Tensor | None
    q_norm: torch.Tensor | None
    k_norm: torch.Tensor | None
    o: torch.Tensor
    mlp_norm: torch.Tensor
    gate_up: torch.Tensor
    down: torch.Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Weights:
    """A whole model over mapped memory; `lm_head` is `embed` where the model ties them."""

    embed: torch.Tensor
    layers: tuple[LayerWeights, ...]
    final_norm: torch.Tensor
    lm_head: torch.Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """The cached file, and whether this call made it."""

    path: Path
    converted: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class _Entry:
    name: str
    parts: tuple[str, ...]
    shape: tuple[int, ...]

    @property
    def size_bytes(self) -> int:
        return 4 * torch.Size(self.shape).numel()


def _entries(config: ModelConfig) -> Iterator[_Entry]:
    hidden, wide = config.hidden, config.intermediate
    q, kv = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
    yield _Entry(name="embed", parts=("embed",), shape=(config.vocab_size, hidden))
    for i in range(config.n_layers):
        yield _Entry(name=f"{i}.attn_norm", parts=(f"{i}.attn_norm",), shape=(hidden,))
        fused = (f"{i}.q", f"{i}.k", f"{i}.v")
        yield _Entry(name=f"{i}.qkv", parts=fused, shape=(q + 2 * kv, hidden))
        if config.qkv_bias:
            yield _Entry(name=f"{i}.qkv_bias", parts=tuple(f"{p}:bias" for p in fused), shape=(q + 2 * kv,))
        if config.qk_norm:
            yield _Entry(name=f"{i}.q_norm", parts=(f"{i}.q_norm",), shape=(config.head_dim,))
            yield _Entry(name=f"{i}.k_norm", parts=(f"{i}.k_norm",), shape=(config.head_dim,))
        yield _Entry(name=f"{i}.o", parts=(f"{i}.o",), shape=(hidden, q))
        yield _Entry(name=f"{i}.mlp_norm", parts=(f"{i}.mlp_norm",), shape=(hidden,))
        yield _Entry(name=f"{i}.gate_up", parts=(f"{i}.gate", f"{i}.up"), shape=(2 * wide, hidden))
        yield _Entry(name=f"{i}.down", parts=(f"{i}.down",), shape=(hidden, wide))
    yield _Entry(name="final_norm", parts=("final_norm",), shape=(hidden,))
    if not config.tied:
        yield _Entry(name="lm_head", parts=("lm_head",), shape=(config.vocab_size, hidden))


def prepare(source: ModelSource, config: ModelConfig, cache_dir: Path) -> Prepared:
    """Make sure that the cached file of `source` exists in `cache_dir`; of several processes at once, one converts.

    Raises InvalidArgument (field `model`) for a checkpoint that does not fit its config, NoSpace when the disk is full.
    """
    shape = hashlib.sha256(repr(config).encode()).hexdigest()[:8]
    path = cache_dir / f"{source.name}-{source.revision[:16]}-{shape}-v{LAYOUT_VERSION}-fp32.weights"
    try:
        cache_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        if path.exists():
            return Prepared(path=path, converted=False)
        with _exclusive(path.with_suffix(".lock")):
            if path.exists():
                return Prepared(path=path, converted=False)
            _convert(Checkpoint(source, config), config, path)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            need_mib = sum(e.size_bytes for e in _entries(config)) >> 20
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


def _convert(checkpoint: Checkpoint, config: ModelConfig, path: Path) -> None:
    entries = list(_entries(config))
    table: dict[str, tuple[int, tuple[int, ...]]] = {}
    at = 0
    for entry in entries:
        table[entry.name] = (at, entry.shape)
        at += -(-entry.size_bytes // _ALIGN) * _ALIGN
    header = json.dumps({"size": at, "tensors": table}).encode()
    base = -(-(len(_MAGIC) + 8 + len(header)) // mmap.PAGESIZE) * mmap.PAGESIZE
    partial = path.with_suffix(".partial")
    try:
        fd = os.open(partial, os.O_CREAT | os.O_TRUNC | os.O_WRONLY, 0o600)
        with os.fdopen(fd, "wb") as file:
            file.write(_MAGIC + len(header).to_bytes(8, "little") + header)
            for entry in entries:
                file.seek(base + table[entry.name][0])
                file.write(_fuse(checkpoint, entry).numpy().data)
            file.truncate(base + at)
            file.flush()
            os.fsync(file.fileno())
        partial.rename(path)
    finally:
        partial.unlink(missing_ok=True)


def _fuse(checkpoint: Checkpoint, entry: _Entry) -> torch.Tensor:
    fused = torch.cat([checkpoint.read(part) for part in entry.parts])
    if tuple(fused.shape) != entry.shape:
        raise InvalidArgument(f"{entry.name} has shape {tuple(fused.shape)}, not {entry.shape}", field="model")
    return fused


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
        for name, (offset, shape) in table.items():
            count = torch.Size(shape).numel()
            flat = torch.frombuffer(data, dtype=torch.float32, count=count, offset=base + offset)
            views[name] = flat.view(shape)
    return views


def _assemble(views: dict[str, torch.Tensor], config: ModelConfig) -> Weights:
    def layer(i: int) -> LayerWeights:
        optional = {k: views.get(f"{i}.{k}") for k in ("qkv_bias", "q_norm", "k_norm")}
        required = {k: views[f"{i}.{k}"] for k in ("attn_norm", "qkv", "o", "mlp_norm", "gate_up", "down")}
        return LayerWeights(**required, **optional)  # type: ignore[arg-type]

    return Weights(
        embed=views["embed"],
        layers=tuple(layer(i) for i in range(config.n_layers)),
        final_norm=views["final_norm"],
        lm_head=views["embed"] if config.tied else views["lm_head"],
    )
