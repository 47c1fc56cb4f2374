"""Blocks on their way down to another tier, encoded as that tier's policy says."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from covey.compression import Codecs, encode, encoded
from covey.errors import InvalidArgument, LayoutMismatch
from covey.net.kv.copying import checksums
from covey.policy.codecs import TierCodecs
from covey.policy.disk_record import Record
from covey.types.block import BlockCodec
from covey.types.kv_state import Tier

LOWER = (Tier.DISK, Tier.REMOTE)


def encoders(codecs: Codecs, policy: TierCodecs) -> Mapping[Tier, Callable[[Record], Record]]:
    """What to do with the blocks of each lower tier; nothing for one that keeps them as they came."""

    def encoder(tier: Tier) -> Callable[[Record], Record]:
        return lambda record: lowered(record, tier, codecs, policy)

    return {tier: encoder(tier) for tier in LOWER if policy.tiers.get(tier, BlockCodec.RAW) is not BlockCodec.RAW}


def lowered(record: Record, tier: Tier, codecs: Codecs, policy: TierCodecs) -> Record:
    """A block as a tier keeps it; as it is when it is encoded already, or when its numbers cannot be."""
    header = record.header
    if header.codec is not BlockCodec.RAW:
        return record
    name = policy.choose(tier, record.tenant, header.shape.element, codecs.names)
    if name is BlockCodec.RAW:
        return record
    try:
        codec = codecs.find(name)
        shape = encoded(codec, header.shape)
        data = encode(codec, record.payload, header.shape)
    except (InvalidArgument, LayoutMismatch):
        return record
    return replace(
        record,
        header=replace(header, codec=name, shape=shape, checksums=checksums(memoryview(data), shape)),
        payload=data,
        raw_bytes=header.shape.size_bytes,
    )
