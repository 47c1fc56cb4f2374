"""A worker whose step or event loop hangs: its streams go on elsewhere, its process ends itself and is started anew."""

from __future__ import annotations

from pathlib import Path

import httpx
import pytest

from covey.testing import assert_eventually
from tests.support.meshes import TINY, chat_body, client_of, mesh_of

pytestmark = [pytest.mark.faults, pytest.mark.timeout(120)]

SETTINGS = (
    "decode.step_stall_s=0.5",
    "decode.stuck_exit_s=4",
    "gateway.routing.split=never",
    "gateway.dispatch.event_gap_s=1.0",
)
TOKENS = 60


@pytest.mark.parametrize("point", ["engine.step=sleep(60)@25", "engine.turn=sleep(60)@25"])
async def test_a_stuck_decode_worker_is_left_and_ends_itself(point: str, tmp_path: Path) -> None:
    """`engine.step` hangs in the step's thread, pings are still answered; `engine.turn` hangs in the event loop."""
    stuck = {"decode-0": {"COVEY_FAILPOINTS": point}}
    async with mesh_of(tmp_path, decode=2, settings=SETTINGS, environments=stuck) as mesh:
        answers = []
        async with client_of(mesh) as client:
            for index in range(6):  # until routing has tried the one that hangs
                prompt = f"Tell me about river number {index}."
                body = chat_body(TINY, prompt, max_tokens=TOKENS, ignore_eos=True)
                response = await client.post("/v1/chat/completions", json=body)
                assert response.status_code == httpx.codes.OK, response.text
                answers.append(response.json())
                if answers[-1]["covey"]["migrations"]:
                    break
            again = await client.post("/v1/chat/completions", json=body)
        assert answers[-1]["covey"]["migrations"] == 1
        assert answers[-1]["usage"]["completion_tokens"] == TOKENS
        texts = {answer["choices"][0]["message"]["content"] for answer in (answers[-1], again.json())}
        assert len(texts) == 1
        await assert_eventually(lambda: not mesh.children["decode-0"].running, timeout_s=20)
        assert mesh.children["decode-0"].process.returncode == 1
