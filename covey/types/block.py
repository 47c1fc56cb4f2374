"""A block of KV: its geometry, how its payload is encoded, and where it lies."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import overload

from covey.errors import InvalidArgument
from covey.types.ids import BlockHash
from covey.types.limits import bounded


class BlockCodec(StrEnum):
    """How a stored payload is encoded. All but RAW lose precision and serve only readers that name them."""

    RAW = "RAW"
    FP16 = "FP16"
    INT8 = "INT8"
    PQ4 = "PQ4"
    XQUANT = "XQUANT"


class KvElement(StrEnum):
    """What a payload's numbers are. OPAQUE: bytes that no codec understands. INT8 pages end with a scale a token."""

    OPAQUE = "OPAQUE"
    FP32 = "FP32"
    FP16 = "FP16"
    INT8 = "INT8"


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockShape:
    """Geometry of a block: one header checksum (xxh3-64) per layer, `size_bytes` of payload, layer-major.

    What lossy codecs need to know: a layer is [2 (K, V), kv_heads] pages of `tokens` tokens; a page of keys is
    [head_dim, tokens], one of values [tokens, head_dim].
    """

    size_bytes: int = bounded(low=1, high=1 << 30)
    layers: int = bounded(low=1, high=4096)
    element: KvElement = KvElement.OPAQUE
    kv_heads: int = bounded(low=0, high=4096, default=0)
    head_dim: int = bounded(low=0, high=4096, default=0)
    tokens: int = bounded(low=0, high=4096, default=0)


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockLocation:
    """Where a committed block is: a slot of this node's arena. `generation` changes whenever the slot is reused."""

    hash: BlockHash
    offset: int
    generation: int
    digest: int
    codec: BlockCodec = BlockCodec.RAW
    size_bytes: int = 0
    """Size of an encoded payload; 0 for RAW, whose size is the shape's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockLocations(Sequence[BlockLocation]):
    """Locations as columns, little-endian: a reply of a thousand of them is five fields, and each is built when asked.

    `codecs` (numbers of `BlockCodec` on the wire) and `sizes` are empty when every block is RAW.
    """

    hashes: bytes = b""
    offsets: bytes = b""
    generations: bytes = b""
    digests: bytes = b""
    codecs: bytes = b""
    sizes: bytes = b""

    def __post_init__(self) -> None:
        count = len(self.offsets) // 8
        wide = (len(self.hashes), 2 * len(self.generations), 2 * len(self.digests)) == (16 * count,) * 3
        encoded = (len(self.codecs), len(self.sizes)) in {(0, 0), (count, 8 * count)}
        if not (wide and encoded and len(self.offsets) == 8 * count):
            raise InvalidArgument("columns of locations have different lengths", field="blocks")
        if self.codecs and not 1 <= min(self.codecs) <= max(self.codecs) <= len(BlockCodec):
            raise InvalidArgument("a codec is unknown", field="blocks.codecs")

    def __len__(self) -> int:
        return len(self.offsets) // 8

    @overload
    def __getitem__(self, i: int) -> BlockLocation: ...

    @overload
    def __getitem__(self, i: slice) -> BlockLocations: ...

    def __getitem__(self, i: int | slice) -> BlockLocation | BlockLocations:
        if isinstance(i, slice):
            return self._part(*i.indices(len(self)))
        at = i + len(self) if i < 0 else i
        if not 0 <= at < len(self):
            raise IndexError(i)
        return BlockLocation(
            hash=BlockHash(self.hashes[16 * at : 16 * at + 16]),
            offset=int.from_bytes(self.offsets[8 * at : 8 * at + 8], "little"),
            generation=int.from_bytes(self.generations[8 * at : 8 * at + 8], "little"),
            digest=int.from_bytes(self.digests[8 * at : 8 * at + 8], "little"),
            codec=_CODECS[self.codecs[at] - 1] if self.codecs else BlockCodec.RAW,
            size_bytes=int.from_bytes(self.sizes[8 * at : 8 * at + 8], "little") if self.sizes else 0,
        )

    @property
    def names(self) -> tuple[BlockHash, ...]:
        """The hashes, in order."""
        data = self.hashes
        return tuple(BlockHash(data[at : at + 16]) for at in range(0, len(data), 16))

    def _part(self, start: int, stop: int, step: int) -> BlockLocations:
        if step != 1:
            raise ValueError("locations are cut without steps")
        wide = slice(8 * start, 8 * max(start, stop))
        return BlockLocations(
            hashes=self.hashes[2 * wide.start : 2 * wide.stop],
            offsets=self.offsets[wide],
            generations=self.generations[wide],
            digests=self.digests[wide],
            codecs=self.codecs[start : max(start, stop)],
            sizes=self.sizes[wide],
        )


_CODECS = tuple(BlockCodec)
