"""Gateway, kvstore and agentflow run where torch is not installed; the engines say at once what they miss."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AsyncExitStack
from pathlib import Path

import httpx
import psutil
import pytest

from covey.cli.child import Child, ChildSpec
from covey.errors import Unavailable
from covey.net.embedded import EmbeddedNats
from tests.support.tiny_llama import write_tiny_llama

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(120)]

BLOCKED = ("torch", "transformers", "sentence_transformers", "safetensors.torch")
BLOCKER = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name in {blocked!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Blocker())
"""


@pytest.fixture(autouse=True)
def _no_blocking() -> None:
    """Off: starting children reads a pipe that is known to be readable."""


async def start(name: str, folder: Path, settings: Mapping[str, object]) -> Child:
    flags = [flag for key, value in settings.items() for flag in ("--set", f"{key}={value}")]
    spec = ChildSpec(
        name=name, module=f"services.{name}", flags=tuple(flags), environment={"PYTHONPATH": str(folder / "blocked")}
    )
    return await Child.start(spec, folder / f"{name}.log", timeout_s=60)


async def test_services_without_a_model_need_no_torch(tmp_path: Path) -> None:
    (tmp_path / "blocked").mkdir()
    (tmp_path / "blocked" / "sitecustomize.py").write_text(BLOCKER.format(blocked=BLOCKED))
    (tmp_path / "token").write_text("mesh-token-of-a-test")
    (tmp_path / "token").chmod(0o600)
    model = write_tiny_llama(tmp_path / "model")
    async with EmbeddedNats.start(tmp_path / "nats") as nats, AsyncExitStack() as stack:
        common = {
            "nats": nats.url, "nats_token_file": nats.token_file, "mesh_token_file": tmp_path / "token",
            "run_dir": tmp_path / "run", "drain_s": 2,
        }  # fmt: skip
        models = f'[{{"name": "tiny", "source": "{model}"}}]'
        edges = {"http_listen": "127.0.0.1:0", "grpc_listen": "127.0.0.1:0", "models": models}
        children: dict[str, Child] = {}
        for name, more in (("kvstore", {"capacity_bytes": 1 << 20}), ("gateway", edges), ("agentflow", {})):
            children[name] = await start(name, tmp_path, {**common, **more})
            stack.push_async_callback(children[name].kill)
            mapped = [m.path for m in psutil.Process(children[name].pid).memory_maps()]
            assert not [path for path in mapped if "torch" in path], name
        async with httpx.AsyncClient(trust_env=False) as client:
            answer = await client.get(f"http://{children['gateway'].addresses['http']}/readyz")
        assert answer.json() == {"status": "no model has a ready worker"}
        # The control: what does need torch ends here, and says how to get it.
        with pytest.raises(
            Unavailable, match=r"(?s)exit code 3.*torch is not installed: pip install 'covey\[engine\]'"
        ):
            await start("decode", tmp_path, {**common, "model": model, "cache_dir": tmp_path / "cache"})
        for child in children.values():
            assert await child.stop(grace_s=15) == 0
