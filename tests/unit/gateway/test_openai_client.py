"""The official client understands everything: whole answers, streams, embeddings, models, errors."""

from __future__ import annotations

from typing import Any

import anyio.to_thread
import openai
import pytest

from covey.types.generate import Role
from tests.support.fake_mesh import API_KEY, MODEL, FakeSemCache, FakeWorker
from tests.support.http_edge import http_edge

MESSAGES: Any = [{"role": "user", "content": "hello"}]


async def test_whole_answers_and_streams() -> None:
    async with http_edge() as edge:
        await edge.mesh.add(FakeWorker(name="d", role=Role.DECODE))
        async with edge.openai() as client:
            whole = await client.chat.completions.create(
                model=MODEL, messages=MESSAGES, temperature=0, logprobs=True, top_logprobs=1, extra_body={"top_k": 1}
            )
            text, usage = "", None
            stream = await client.chat.completions.create(
                model=MODEL, messages=MESSAGES, temperature=0, stream=True, stream_options={"include_usage": True}
            )
            async for chunk in stream:
                text += "".join(c.delta.content or "" for c in chunk.choices)
                usage = chunk.usage or usage
            legacy = await client.completions.create(model=MODEL, prompt="ab", temperature=0, max_tokens=3, logprobs=0)
            legacy_text = ""
            async for part in await client.completions.create(model=MODEL, prompt="ab", temperature=0, stream=True):
                legacy_text += part.choices[0].text
    assert whole.choices[0].message.content == text
    assert whole.choices[0].logprobs is not None
    assert whole.usage is not None
    assert usage is not None
    assert usage.completion_tokens == whole.usage.completion_tokens == 12
    assert whole.model_extra is not None
    assert whole.model_extra["covey"]["cache"] == "off"
    assert legacy.choices[0].finish_reason == "length"
    assert legacy_text.startswith(legacy.choices[0].text)


async def test_embeddings_and_models() -> None:
    async with http_edge() as edge:
        await edge.mesh.add_semcache(FakeSemCache())
        await edge.mesh.add(FakeWorker(name="d", role=Role.DECODE))
        async with edge.openai() as client:
            vectors = await client.embeddings.create(model="tiny-embedder", input=["abc"])
            listed = [m.id async for m in client.models.list()]
            one = await client.models.retrieve(MODEL)
    assert vectors.data[0].embedding == [3.0, 0.5]
    assert MODEL in listed
    assert one.owned_by == "covey"


async def test_errors_are_the_clients_own() -> None:
    async with http_edge() as edge:
        worker = await edge.mesh.add(FakeWorker(name="d", role=Role.DECODE))
        async with edge.openai() as client:
            with pytest.raises(openai.NotFoundError) as missing:
                await client.chat.completions.create(model="none", messages=MESSAGES)
            with pytest.raises(openai.BadRequestError) as refused:
                await client.chat.completions.create(
                    model=MODEL, messages=MESSAGES, tools=[{"type": "function", "function": {"name": "f g"}}]
                )
            with pytest.raises(openai.AuthenticationError):
                await client.with_options(api_key="wrong").chat.completions.create(model=MODEL, messages=MESSAGES)
            worker.die_after = 2
            with pytest.raises(openai.APIError, match="lost"):
                async for _ in await client.chat.completions.create(model=MODEL, messages=MESSAGES, stream=True):
                    pass
    assert missing.value.code == "model_not_found"
    assert refused.value.param == "tools[0].function.name"


async def test_the_synchronous_client() -> None:
    async with http_edge() as edge:
        await edge.mesh.add(FakeWorker(name="d", role=Role.DECODE))

        def ask() -> str:
            with openai.OpenAI(base_url=f"{edge.url}/v1", api_key=API_KEY) as client:
                return client.chat.completions.create(model=MODEL, messages=MESSAGES).choices[0].message.content or ""

        assert len(await anyio.to_thread.run_sync(ask)) == 12
