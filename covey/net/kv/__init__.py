"""The client of the KV store."""

from __future__ import annotations

from covey.net.kv.client import KvClient
from covey.net.kv.config import KvClientConfig
from covey.net.kv.node import StoreNode, nodes_of

__all__ = ["KvClient", "KvClientConfig", "StoreNode", "nodes_of"]
