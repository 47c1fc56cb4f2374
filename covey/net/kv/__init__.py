"""The client of the KV store."""

from __future__ import annotations

from covey.net.kv.client import KvClient, KvClientConfig
from covey.net.kv.node import StoreNode

__all__ = ["KvClient", "KvClientConfig", "StoreNode"]
