"""The in-process double of RPC and bus: same surface, no sockets, faults from a seed; runs under virtual time."""

from __future__ import annotations

from covey.net.memory_bus import MemoryBroker, MemoryBus
from covey.net.memory_rpc import MemoryNetwork, MemoryServer
from covey.net.memory_wire import Faults

__all__ = ["Faults", "MemoryBroker", "MemoryBus", "MemoryNetwork", "MemoryServer"]
