"""The questions of `covey bench kv`: which blocks, moved how, by how many clients."""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.drivers.kv_load import blocks_of

SIZES = {"64kib": 64 << 10, "1mib": 1 << 20, "4mib": 4 << 20}
TRANSPORTS = ("shm", "grpc", "tcp")
CLIENTS = (1, 8, 64)
CROWDED = "1mib"
"""The size that is also moved by more than one client."""
LOOKUPS = (1, 100, 1000)
OPERATIONS = ("put", "get")


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """A batch of blocks of one size, divided among clients."""

    word: str
    size_bytes: int
    clients: int

    @property
    def batch_bytes(self) -> int:
        """What one operation moves."""
        return blocks_of(self.size_bytes) * self.size_bytes

    def case(self, transport: str = "") -> str:
        """Its word in rows and ratios: `1mib-shm`, and `1mib-shm-c8` with more than one client."""
        return "-".join(word for word in (self.word, transport, f"c{self.clients}" * (self.clients > 1)) if word)


def loads() -> list[Load]:
    """All of them, one client first."""
    alone = [Load(word=word, size_bytes=size, clients=1) for word, size in SIZES.items()]
    crowds = [Load(word=CROWDED, size_bytes=SIZES[CROWDED], clients=clients) for clients in CLIENTS if clients > 1]
    return alone + crowds
