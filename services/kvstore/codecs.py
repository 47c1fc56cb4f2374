"""Settings of how blocks are encoded, and the codecs that follow from them."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

from covey.compression import Codecs
from covey.config import ConfigError, Positive
from covey.net.kv.codebook_file import read_codebook
from covey.policy.codecs import TierCodecs
from covey.types.block import BlockCodec
from covey.types.ids import TenantId
from covey.types.kv_state import Tier

CodecName = Literal["RAW", "FP16", "INT8", "PQ4"]


class CodecSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """How each tier keeps blocks. All but RAW lose precision, and serve only engines whose `kv_codecs` names them."""

    memory: CodecName = "RAW"
    """What blocks become once the arena is fuller than `memory_above`."""
    disk: CodecName = "RAW"
    """What blocks become on their way to the disk."""
    remote: CodecName = "RAW"
    """What blocks become on their way to the engine that a fleet shares."""
    tenants: dict[str, CodecName] = {}
    """Another codec for a tenant, in every tier that has one."""
    memory_above: Annotated[float, msgspec.Meta(ge=0, le=1)] = 0.7
    memory_every_s: Positive = 30.0
    """How often the arena's fill is looked at."""
    recent_blocks: Annotated[int, msgspec.Meta(ge=0, le=1024)] = 1
    """Blocks at the end of each chain that stay exact."""
    error_max: Annotated[float, msgspec.Meta(ge=0, le=1)] = 0.25
    """A block stays as it is when its numbers would be off by more than this, root mean squares compared."""
    codebook: str | None = None
    """The file that `covey codebook` wrote, for PQ4; engines that read such blocks need the same one."""

    def policy(self) -> TierCodecs:
        """Which codec is chosen when."""
        tiers = {Tier.MEMORY: self.memory, Tier.DISK: self.disk, Tier.REMOTE: self.remote}
        return TierCodecs(
            tiers={tier: BlockCodec(name) for tier, name in tiers.items()},
            tenants={TenantId(tenant): BlockCodec(name) for tenant, name in self.tenants.items()},
            recent_blocks=self.recent_blocks,
        )

    def open(self) -> Codecs:
        """Read the codebook. Raises `ConfigError` when it is missing, damaged, or wanted and not named."""
        names = {self.memory, self.disk, self.remote, *self.tenants.values()}
        if self.codebook is None and "PQ4" in names:
            raise ConfigError("PQ4 needs a codebook: `covey codebook` trains one", field="codecs.codebook")
        return Codecs(None if self.codebook is None else read_codebook(self.codebook, field="codecs.codebook"))
