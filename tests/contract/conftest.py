"""The wires that the RPC contract suite runs against."""

from __future__ import annotations

import pytest

from covey.net.memory import MemoryNetwork
from covey.net.rpc import Channel, serve
from tests.support.rpc import Wire


@pytest.fixture(params=["grpc", "memory"])
def wire(request: pytest.FixtureRequest) -> Wire:
    """gRPC over real sockets, and the in-process double."""
    if request.param == "grpc":
        return Wire(serve, Channel.open)
    network = MemoryNetwork()
    return Wire(network.serve, network.channel)
