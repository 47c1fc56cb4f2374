"""A context longer than any one decode worker's pool, over real processes; its creditor is killed in mid-stream."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import anyio
import pytest

from covey.auth import MeshToken
from covey.cli.chat import delta_text, stream_chat
from covey.cli.child import Child
from covey.cli.mesh import Mesh
from covey.codec.methods import Decode
from covey.net.rpc import Channel
from covey.testing import assert_eventually
from covey.types.common import Empty
from covey.types.generate import EngineLoad
from tests.support.meshes import TINY, chat_body, client_of, mesh_of

pytestmark = [pytest.mark.faults, pytest.mark.timeout(240)]

BLOCK, POOL, WORKERS = 8, 24, 3
TOKENS = 170
SETTINGS = (
    "gateway.routing.split=never",
    *(f"{role}.block_size={BLOCK}" for role in ("prefill", "decode")),
    f"decode.kv_blocks={POOL}",
    "decode.lend_share=1.0",
    "decode.borrow_blocks=64",
    "decode.loan_ttl_s=2.0",
)
BODY = chat_body(TINY, "Tell me about rivers, and about the seas they run to.", max_tokens=TOKENS, ignore_eos=True)


async def loads(mesh: Mesh) -> dict[str, EngineLoad]:
    """What each decode worker that lives says of itself."""
    token = MeshToken((mesh.plan.files.run_dir / "mesh.token").read_text())
    found = {}
    for name, child in mesh.children.items():
        if name.startswith("decode") and child.process.returncode is None:
            async with Channel.open(child.addresses["grpc"], token=token) as channel:
                found[name] = await channel.call(Decode.LOAD, Empty(), timeout_s=5.0)
    return found


async def creditor(mesh: Mesh) -> Child:
    """A worker that keeps blocks for another one and runs nothing itself."""
    with anyio.fail_after(30):
        while True:
            for name, load in (await loads(mesh)).items():
                if not load.running and load.free_blocks + load.cached_blocks < load.total_blocks:
                    return mesh.children[name]


async def answered(mesh: Mesh, disturb: Any = None) -> tuple[str, dict[str, Any]]:
    text, last = "", {}
    async with client_of(mesh) as client:
        async for chunk in stream_chat(client, BODY):
            text += delta_text(chunk)
            if disturb is not None and len(text) > 10:
                await disturb()
                disturb = None
            last = chunk
    return text, last


async def test_a_long_context_lives_on_several_workers_and_outlives_one_of_them(tmp_path: Path) -> None:
    slow = {f"decode-{i}": {"COVEY_FAILPOINTS": "engine.after_step=sleep(0.005)"} for i in range(WORKERS)}
    async with mesh_of(tmp_path, settings=SETTINGS, decode=WORKERS, environments=slow) as mesh:

        async def kill() -> None:
            (await creditor(mesh)).process.kill()

        undisturbed, last = await answered(mesh)
        usage = last["usage"]
        assert usage["completion_tokens"] == TOKENS
        assert usage["prompt_tokens"] + TOKENS > BLOCK * POOL
        assert last["covey"]["migrations"] == 0

        async def is_given_back() -> bool:
            found = (await loads(mesh)).values()
            return all(load.free_blocks + load.cached_blocks == load.total_blocks for load in found)

        await assert_eventually(is_given_back, timeout_s=10)
        text, last = await answered(mesh, kill)
        assert text == undisturbed
        assert last["covey"]["migrations"] >= 1
        assert last["usage"]["completion_tokens"] == TOKENS
        await assert_eventually(is_given_back, timeout_s=10)
