"""The codecs that a process has: those that need nothing, and product quantisation where there is a codebook."""

from __future__ import annotations

from collections.abc import Mapping

from covey.compression.codebook import Codebook
from covey.compression.codec import Codec
from covey.compression.fp16 import Fp16
from covey.compression.int8 import Int8
from covey.compression.pq4 import Pq4
from covey.errors import LayoutMismatch
from covey.types.block import BlockCodec


class Codecs:
    """Codecs by name."""

    def __init__(self, codebook: Codebook | None = None) -> None:
        known: list[Codec] = [Fp16(), Int8()]
        if codebook is not None:
            known.append(Pq4(codebook))
        self._known: Mapping[BlockCodec, Codec] = {codec.name: codec for codec in known}

    @property
    def names(self) -> frozenset[BlockCodec]:
        """What `find` knows."""
        return frozenset(self._known)

    def find(self, name: BlockCodec) -> Codec:
        """A codec. Raises `LayoutMismatch` for one that this process cannot read or write."""
        codec = self._known.get(name)
        if codec is None:
            raise LayoutMismatch(f"no {name} here; PQ4 needs the codebook that `codebook` names", field="codec")
        return codec
