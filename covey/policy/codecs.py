"""Which codec a tier keeps a tenant's blocks in, and which blocks stay exact."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field

from covey.types.block import BlockCodec, KvElement
from covey.types.ids import BlockHash, TenantId
from covey.types.kv_state import Tier

_BITS = {BlockCodec.FP16: 16, BlockCodec.INT8: 8, BlockCodec.PQ4: 4}
_ELEMENT_BITS = {KvElement.FP32: 32, KvElement.FP16: 16, KvElement.INT8: 8}


@dataclass(frozen=True, slots=True, kw_only=True)
class TierCodecs:
    """A codec for each tier; `tenants` names those for whom another one holds in every tier.

    A tier that is not named keeps blocks as they came.
    """

    tiers: Mapping[Tier, BlockCodec] = field(default_factory=dict)
    tenants: Mapping[TenantId, BlockCodec] = field(default_factory=dict)
    recent_blocks: int = 1
    """How many blocks at the end of each chain stay exact (MILLION: recent tokens)."""

    def choose(self, tier: Tier, tenant: TenantId, element: KvElement, known: Collection[BlockCodec]) -> BlockCodec:
        """The codec for a tenant's blocks in a tier: RAW when the chosen one saves nothing, or is not `known` here."""
        wanted = self.tiers.get(tier, BlockCodec.RAW)
        if wanted is not BlockCodec.RAW:
            wanted = self.tenants.get(tenant, wanted)
        return wanted if wanted in known and can_recode(BlockCodec.RAW, wanted, element) else BlockCodec.RAW


def can_recode(present: BlockCodec, wanted: BlockCodec, element: KvElement) -> bool:
    """Whether a block of these numbers becomes smaller: what a codec lost does not come back.

    XQUANT is not made of keys and values.
    """
    bits = _BITS.get(present, 0 if present is not BlockCodec.RAW else _ELEMENT_BITS.get(element, 0))
    return wanted in _BITS and _BITS[wanted] < bits


def settled(parents: Iterable[tuple[BlockHash, BlockHash]], recent_blocks: int) -> frozenset[BlockHash]:
    """Those of some blocks, given as (block, the block it grows from), that are not at the end of a chain.

    A block is recent while fewer than `recent_blocks` blocks grow from it, one from the other.
    """
    parent_of = dict(parents)
    found = frozenset(parent_of)
    for _ in range(recent_blocks):
        found = frozenset(parent_of[name] for name in found) & parent_of.keys()
    return found
