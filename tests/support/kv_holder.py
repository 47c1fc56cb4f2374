"""A process that holds something of a kvstore until it is killed: `python -m tests.support.kv_holder ADDRESS WHAT TTL`.

WHAT is `write` (it dies between Reserve and Commit), `read`, `hard` or `soft`. The blocks are those of `chain`.
"""

from __future__ import annotations

import sys
from hashlib import blake2b

import anyio

from covey import failpoint
from covey.clock import MonotonicClock
from covey.codec.methods import KvStore
from covey.net.kv import KvClient, StoreNode
from covey.net.rpc import Channels
from covey.types.block import BlockShape
from covey.types.ids import BlockHash, NamespaceId, TenantId, WorkerId
from covey.types.kv import BlockKey, PinKind, PinRequest
from covey.types.store import StoreKey
from tests.contract.kv_stores import BOOT_ID
from tests.support.kv_mesh import Chain

SHAPE = BlockShape(size_bytes=4 * 8192, layers=4)


def chain(count: int = 4) -> Chain:
    """The same blocks in every process."""
    names = [BlockHash(blake2b(b"%d" % i, digest_size=16).digest()) for i in range(count)]
    blocks = [BlockKey(hash=n, parent=names[i - 1] if i else BlockHash(b"")) for i, n in enumerate(names)]
    key = StoreKey(tenant=TenantId("t"), namespace=NamespaceId(b"h" * 16), shape=SHAPE)
    return Chain(key, blocks, [memoryview(bytes([i]) * SHAPE.size_bytes) for i in range(count)])


async def hold(address: str, what: str, ttl_s: float) -> None:
    """Take it, say so, and wait for the end."""
    held = chain()
    node = StoreNode(worker=WorkerId("kv-0"), address=address, capacity_bytes=1 << 20)
    async with Channels.open() as channels:
        store = KvClient(lambda: [node], channels, clock=MonotonicClock(), boot_id=BOOT_ID)
        if what == "write":
            failpoint.arm("kv.before_commit=crash")
            await held.put(store, ttl_s=ttl_s)
        elif what == "read":
            await held.find(store, ttl_s=ttl_s)
        else:
            request = PinRequest(
                tenant=held.key.tenant, namespace=held.key.namespace, hashes=tuple(held.names),
                kind=PinKind(what.upper()), ttl_s=ttl_s, owner="holder",
            )  # fmt: skip
            await channels.to(address).call(KvStore.PIN, request, timeout_s=5)
        sys.stdout.write("held\n")
        sys.stdout.flush()
        await anyio.sleep(60)


if __name__ == "__main__":
    anyio.run(hold, sys.argv[1], sys.argv[2], float(sys.argv[3]))
