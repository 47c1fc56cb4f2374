"""A service in miniature, for tests of the runtime: one slow RPC over the whole stack."""

from __future__ import annotations

import sys

import anyio

from covey import failpoint
from covey.codec.methods import Decode
from covey.config import CommonConfig
from covey.errors import Unavailable
from covey.net.rpc import Call
from covey.runtime import Runtime, run
from covey.types.common import Empty
from covey.types.generate import EngineLoad, Role


class Config(CommonConfig, frozen=True):
    listen: str = "127.0.0.1:0"
    slow_s: float = 0.5
    misbehave: str = ""


async def serve(config: Config, rt: Runtime) -> None:
    async def load(request: Empty, call: Call) -> EngineLoad:
        await failpoint.hit_async("probe.load")
        await anyio.sleep(config.slow_s)
        return EngineLoad(running=1)

    if config.misbehave == "crash":
        raise RuntimeError("on purpose")
    if config.misbehave == "dependency":
        raise Unavailable("the store is not there")
    async with rt.bus() as bus:
        async with rt.serve_rpc(config.listen, {Decode.LOAD: load}) as server:
            async with rt.announce(bus, Role.DECODE, server.address):
                await rt.ready()
                if config.misbehave == "crash late":
                    raise RuntimeError("on purpose")
                await rt.until_stopped()


if __name__ == "__main__":
    sys.exit(run(serve, Config, name="decode"))
