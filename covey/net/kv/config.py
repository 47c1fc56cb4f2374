"""Settings of a client of the store."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from covey.compression import Codebook
from covey.types.block import BlockCodec


@dataclass(frozen=True, slots=True, kw_only=True)
class KvClientConfig:
    """How a client reaches the store."""

    transport: Literal["auto", "shm", "grpc", "tcp"] = "auto"
    """`auto`: shared memory on one host, else the bulk channel where a node announces one, else gRPC."""
    call_timeout_s: float = 1.0
    cold_wait_s: float = 0.5
    """How long a look-up may wait for blocks that a node brings up from disk or from a shared engine."""
    transfer_timeout_s: float = 60.0
    """How long a stream over gRPC may take for each 64 MiB."""
    stall_timeout_s: float = 2.0
    """How long a stream or a bulk channel may stand still in the middle of an exchange."""
    nodes_tried: int = 2
    """How many nodes, in a chain's order of preference, an operation asks when they do not answer."""
    roots_max: int = 65_536
    """Blocks whose chain is remembered, so that a later part of a chain goes where its start is."""
    settling_s: float = 30.0
    """How long after a change of the ring, or a node's silence, blocks are also looked for where they were before."""
    codecs: tuple[BlockCodec, ...] = ()
    """Lossy codecs of blocks that this client may read; it decodes them, PQ4 with `codebook`."""
    codebook: Codebook | None = None
    copies_max: int = 2
    """Threads that copy at a time."""
    bulk_threads_max: int = 4
    """Threads that send or receive over bulk channels at a time."""
