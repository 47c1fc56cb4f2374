"""RPC between services: typed methods of `covey.codec.methods`, deadlines, one error tree, no generated stubs.

async with Channel.open("127.0.0.1:7003", token=mesh_token) as channel:
    reply = await channel.call(KvStore.LOOKUP, request, timeout_s=1.0)
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from opentelemetry.trace import Tracer

from covey.net.call import MESSAGE_BYTES_MAX, Call, Gatekeeper, Handler, Handlers, Token, current_request_id
from covey.net.channels import Channel, Channels, Replies
from covey.net.transport import Server

__all__ = [
    "MESSAGE_BYTES_MAX",
    "Call",
    "Channel",
    "Channels",
    "Gatekeeper",
    "Handler",
    "Handlers",
    "Replies",
    "Server",
    "Token",
    "current_request_id",
    "serve",
]


@asynccontextmanager
async def serve(
    address: str,
    handlers: Handlers,
    *,
    token: Token | Gatekeeper | None = None,
    grace_s: float = 10.0,
    message_bytes_max: int = MESSAGE_BYTES_MAX,
    tracer: Tracer | None = None,
) -> AsyncIterator[Server]:
    """Serve handlers on `host:port` for a block; an empty host is 127.0.0.1, port 0 picks a free one.

    What a handler raises from `covey.errors` reaches its caller as the same class, anything else as `Internal`
    with a reference to the log. Calls that do not carry the `token`, or that the gatekeeper in its place does not
    admit, are refused; health is for everyone. On leaving the block health says NOT_SERVING, new calls are refused,
    calls in flight have `grace_s` seconds, then they are cancelled. Each call is a span of `tracer`, if there is one.

    Raises:
        Unavailable: the address cannot be bound.
    """
    # Imported here: clients have neither health nor reflection installed.
    from covey.net.rpc_server import serve_grpc

    async with serve_grpc(
        address, handlers, token=token, grace_s=grace_s, message_bytes_max=message_bytes_max, tracer=tracer
    ) as server:
        yield server
