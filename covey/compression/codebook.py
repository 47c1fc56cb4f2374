"""The codebooks of product quantisation: what they are, their file, and their training."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import xxhash
from numpy.typing import NDArray

from covey.compression.pages import Floats, Pages
from covey.errors import DataCorrupt, InvalidArgument
from covey.types.block import BlockShape

MAGIC = b"COVEYPQ1"
CODES = 256
PAIR = 2
"""Numbers of a sub-space: 8 bits a pair are 4 bits a number."""
LENGTH_BYTES = 4
_HEADER_MAX = 65_536
_SCORES_MAX = 1 << 22
"""Scores of points against centroids that are held at once."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Codebook:
    """Centroids [layer, 2 (K, V), head, pair, 256, 2] in half precision, for one model and revision."""

    model: str
    revision: str
    centroids: NDArray[np.float16]
    id: int = field(init=False)
    """xxh3-64 of identity and centroids: every encoded layer begins with it."""

    def __post_init__(self) -> None:
        shape = self.centroids.shape
        if len(shape) != 6 or shape[1] != 2 or shape[4:] != (CODES, PAIR) or not np.isfinite(self.centroids).all():
            raise InvalidArgument("centroids are finite numbers [layer, 2, head, pair, 256, 2]", field="centroids")
        name = json.dumps([self.model, self.revision, shape]).encode()
        object.__setattr__(self, "id", xxhash.xxh3_64_intdigest(name + self.centroids.tobytes()))

    def fits(self, shape: BlockShape) -> bool:
        """Whether blocks of this shape have these layers, heads and pairs."""
        layers, _, heads, pairs = self.centroids.shape[:4]
        return (layers, heads, pairs * PAIR) == (shape.layers, shape.kv_heads, shape.head_dim)

    def to_bytes(self) -> bytes:
        """The codebook's file: magic, header, centroids, checksum of all before it."""
        header = json.dumps({"model": self.model, "revision": self.revision, "shape": self.centroids.shape}).encode()
        body = MAGIC + len(header).to_bytes(LENGTH_BYTES, "little") + header + self.centroids.astype("<f2").tobytes()
        return body + xxhash.xxh3_64_digest(body)

    @classmethod
    def from_bytes(cls, data: bytes) -> Codebook:
        """Read a file. Raises `DataCorrupt` when it is damaged or none."""
        body, checksum = data[:-8], data[-8:]
        if body[: len(MAGIC)] != MAGIC or xxhash.xxh3_64_digest(body) != checksum:
            raise DataCorrupt("not a codebook, or a damaged one: train it again")
        start = len(MAGIC) + LENGTH_BYTES
        size = int.from_bytes(body[len(MAGIC) : start], "little")
        try:
            header = json.loads(body[start : start + min(size, _HEADER_MAX)])
            centroids = np.frombuffer(body, dtype="<f2", offset=start + size).reshape(header["shape"])
            return cls(model=str(header["model"]), revision=str(header["revision"]), centroids=centroids)
        except (ValueError, KeyError, TypeError, InvalidArgument) as error:
            raise DataCorrupt("the header of a codebook does not fit its centroids") from error


def pairs_of(pages: Pages) -> Floats:
    """Neighbouring numbers of a head, for keys one rotary pair each: [layer, 2 (K, V), head, pair, token, 2]."""
    layers, heads, width, tokens = pages.keys.shape
    keys = pages.keys.reshape(layers, heads, width // PAIR, PAIR, tokens).transpose(0, 1, 2, 4, 3)
    values = pages.values.reshape(layers, heads, tokens, width // PAIR, PAIR).transpose(0, 1, 3, 2, 4)
    return np.stack((keys, values), axis=1)


def pages_of(pairs: Floats) -> Pages:
    """The inverse of `pairs_of`."""
    layers, _, heads, count, tokens, _ = pairs.shape
    keys = pairs[:, 0].transpose(0, 1, 2, 4, 3).reshape(layers, heads, count * PAIR, tokens)
    values = pairs[:, 1].transpose(0, 1, 3, 2, 4).reshape(layers, heads, tokens, count * PAIR)
    return Pages(keys=keys, values=values)


def nearest(points: Floats, centroids: Floats) -> NDArray[np.uint8]:
    """The nearest centroid of each point: [sub-space, point, 2] against [sub-space, 256, 2]."""
    # |p - c|² less |p|², which is the same for all c: one product of (p, 1) and (-2c, |c|²).
    lengths = np.einsum("scp,scp->sc", centroids, centroids)[:, None, :]
    table = np.concatenate((-2.0 * centroids.transpose(0, 2, 1), lengths), axis=1)
    out = np.empty(points.shape[:2], dtype=np.uint8)
    step = max(1, _SCORES_MAX // (CODES * points.shape[1]))
    for start in range(0, len(points), step):
        chunk = points[start : start + step]
        ones = np.ones((*chunk.shape[:2], 1), dtype=np.float32)
        scores = np.matmul(np.concatenate((chunk, ones), axis=2), table[start : start + step])
        out[start : start + step] = scores.argmin(axis=2)
    return out


def train(
    blocks: Sequence[Pages],
    *,
    model: str,
    revision: str,
    rounds: int,
    rng: np.random.Generator,
    done: Callable[[int, int], None] | None = None,
) -> Codebook:
    """K-means over the blocks of a text, each sub-space on its own (MILLION, offline part; ours: by head too).

    `done` hears of each layer, and of how many. Raises `InvalidArgument` when there are fewer tokens than centroids.
    """
    layers, heads, width, _ = blocks[0].keys.shape if blocks else (0, 0, 0, 0)
    tokens = sum(pages.keys.shape[3] for pages in blocks)
    if tokens < CODES:
        raise InvalidArgument(f"{tokens} tokens cannot train {CODES} centroids: give a longer text", field="text")
    centroids = np.empty((layers, 2, heads, width // PAIR, CODES, PAIR), dtype=np.float16)
    for layer in range(layers):
        pairs = [pairs_of(pages.of(layer)) for pages in blocks]
        points = np.concatenate(pairs, axis=4).reshape(-1, tokens, PAIR)
        found = points[:, rng.choice(tokens, CODES, replace=False)].copy()
        for _ in range(rounds):
            found = _improved(points, found, rng)
        centroids[layer] = found.reshape(centroids.shape[1:])
        if done is not None:
            done(layer, layers)
    return Codebook(model=model, revision=revision, centroids=centroids)


def _improved(points: Floats, centroids: Floats, rng: np.random.Generator) -> Floats:
    """One round: each centroid moves to the middle of its points; one without any takes a random point."""
    spaces, tokens, _ = points.shape
    codes = nearest(points, centroids).astype(np.int64)
    flat = (codes + CODES * np.arange(spaces)[:, None]).reshape(-1)
    counts = np.bincount(flat, minlength=spaces * CODES)
    sums = [np.bincount(flat, weights=points[..., axis].reshape(-1), minlength=len(counts)) for axis in range(PAIR)]
    means = (np.stack(sums, axis=-1) / np.maximum(counts, 1)[:, None]).astype(np.float32)
    means = means.reshape(spaces, CODES, PAIR)
    space, code = np.nonzero(counts.reshape(spaces, CODES) == 0)
    means[space, code] = points[space, rng.integers(tokens, size=len(space))]
    return means
