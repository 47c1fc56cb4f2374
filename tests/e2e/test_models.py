"""Several models at once: two of this mesh's own with other weights, and one at somebody else's URL."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anyio.from_thread
import openai
import pytest

import covey
from covey.auth import MeshToken
from covey.cli.files import MeshFiles
from covey.cli.mesh import Mesh, MeshPlan, running
from covey.cli.up import publish
from covey.codec.methods import Decode
from covey.net.rpc import Channel
from covey.types.common import Empty
from covey.types.generate import EngineInfo
from tests.support.meshes import LEAN
from tests.support.openai_server import KEY, MODEL, VendorServer, answer_to, vendor_server
from tests.support.tiny_llama import write_tiny_llama

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(180)]

REMOTE = "elsewhere"
LONG = "Tell me about rivers, lakes and seas. " * 8
"""Several blocks of it."""


@pytest.fixture(scope="module")
def vendor() -> Iterator[VendorServer]:
    with vendor_server() as server:
        yield server


@pytest.fixture(scope="module")
def mesh(tmp_path_factory: pytest.TempPathFactory, vendor: VendorServer) -> Iterator[Mesh]:
    folder = tmp_path_factory.mktemp("models")
    sources = {name: str(write_tiny_llama(folder / name, seed=seed)) for seed, name in enumerate(("a", "b"))}
    key_file = folder / "vendor.key"
    key_file.touch(mode=0o600)
    key_file.write_text(KEY)
    base = folder / "covey.toml"
    base.write_text(_models_table(sources, vendor.url, key_file))
    plan = MeshPlan(
        files=MeshFiles(run_dir=folder / "run", cache_dir=folder / "cache", base=base),
        models=sources,
        settings=LEAN,
        restart=False,
    )
    with (
        anyio.from_thread.start_blocking_portal() as portal,
        portal.wrap_async_context_manager(running(plan)) as mesh,
    ):
        publish(mesh)
        yield mesh


def _models_table(sources: dict[str, str], url: str, key_file: Path) -> str:
    """A `covey.toml` that names a key and another name for the remote model, as `--model NAME=URL` cannot."""
    local = "".join(f'[[gateway.models]]\nname = "{name}"\nsource = "{path}"\n' for name, path in sources.items())
    remote = f'name = "{REMOTE}"\nurl = "{url}"\nremote_name = "{MODEL}"\napi_key_file = "{key_file}"\n'
    return f"{local}[[gateway.models]]\n{remote}"


@pytest.fixture
def client(mesh: Mesh) -> Iterator[openai.OpenAI]:
    key = mesh.plan.files.api_key_file.read_text()
    with openai.OpenAI(base_url=f"{mesh.http}/v1", api_key=key, max_retries=0) as client:
        yield client


def _ask(client: openai.OpenAI, model: str, **options: Any) -> Any:
    messages: Any = [{"role": "user", "content": LONG}]
    extra = {"cache": "bypass"}
    return client.chat.completions.create(
        model=model, messages=messages, max_tokens=12, temperature=0, extra_body=extra, **options
    )


def test_two_models_answer_differently_and_share_no_kv(client: openai.OpenAI) -> None:
    first = {model: _ask(client, model) for model in ("a", "b")}
    assert first["a"].choices[0].message.content != first["b"].choices[0].message.content
    for model in ("a", "b"):  # b came after a with the very same tokens, and found nothing of it
        assert first[model].covey["cached_tokens"] == first[model].covey["loaded_tokens"] == 0, model
    for model in ("a", "b"):
        again = _ask(client, model)
        assert again.covey["cached_tokens"] + again.covey["loaded_tokens"] > 0
        assert again.choices[0].message.content == first[model].choices[0].message.content


async def test_each_model_has_workers_and_a_revision_of_its_own(mesh: Mesh) -> None:
    token = MeshToken((mesh.plan.files.run_dir / "mesh.token").read_text())
    infos: dict[str, EngineInfo] = {}
    for name in ("a", "b"):
        address = mesh.children[f"decode-0-{name}"].addresses["grpc"]
        async with Channel.open(address, token=token) as channel:
            infos[name] = await channel.call(Decode.INFO, Empty(), timeout_s=5.0)
    assert {name: info.model for name, info in infos.items()} == {"a": "a", "b": "b"}
    assert infos["a"].revision != infos["b"].revision


def test_all_models_are_listed(client: openai.OpenAI) -> None:
    assert {"a", "b", REMOTE} <= {model.id for model in client.models.list()}


def test_an_unknown_model_is_refused_with_those_there_are(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as refused:
        _ask(client, "c")
    assert refused.value.param == "model"
    assert all(f"{name}" in refused.value.message for name in ("a", "b", REMOTE))


def test_a_remote_model_answers_whole_and_streamed(client: openai.OpenAI, vendor: VendorServer) -> None:
    whole = _ask(client, REMOTE)
    assert whole.choices[0].message.content == answer_to(LONG)
    assert whole.choices[0].finish_reason == "stop"
    assert (whole.usage.prompt_tokens, whole.usage.completion_tokens) == (7, len(answer_to(LONG).split(" ")))
    chunks = list(_ask(client, REMOTE, stream=True))
    texts = [chunk.choices[0].delta.content for chunk in chunks if chunk.choices and chunk.choices[0].delta.content]
    assert len(texts) > 1
    assert "".join(texts) == answer_to(LONG)
    assert [body["max_tokens"] for body in vendor.bodies] == [12, 12]


@covey.semantic(model="a", max_tokens=8, temperature=0)
def draft(topic: str) -> str:  # type: ignore[empty-body]
    """Write about {{topic}}"""


@covey.semantic(model=REMOTE, max_tokens=8)
def polish(text: str) -> str:  # type: ignore[empty-body]
    """Polish: {{text}}"""


async def test_one_program_uses_several_models(mesh: Mesh) -> None:
    async with covey.Client.connect(run_dir=mesh.plan.files.run_dir) as client, client.program():
        rough = draft("rivers")
        assert await polish(rough) == answer_to(f"Polish: {await rough}")
