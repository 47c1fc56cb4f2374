"""The official `openai` client, sync, async and streaming, against a mesh of real processes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anyio
import anyio.from_thread
import httpx
import openai
import pytest

from covey.cli.mesh import Mesh
from tests.support.meshes import TINY, mesh_of

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(180)]

MESSAGES: Any = [{"role": "user", "content": "Say something."}]


@pytest.fixture(scope="module")
def mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mesh]:
    folder = tmp_path_factory.mktemp("openai")
    with (
        anyio.from_thread.start_blocking_portal() as portal,
        portal.wrap_async_context_manager(mesh_of(folder)) as mesh,
    ):
        yield mesh


@pytest.fixture
def client(mesh: Mesh) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{mesh.http}/v1", api_key=_key(mesh), max_retries=0) as client:
        yield client


def _key(mesh: Mesh) -> str:
    return Path(mesh.plan.files.api_key_file).read_text()


def test_chat(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model=TINY, messages=MESSAGES, max_tokens=12, temperature=0)
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].finish_reason in {"stop", "length"}
    assert answer.usage is not None
    assert answer.usage.completion_tokens <= 12
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def test_a_stream_carries_the_same_text_one_id_and_the_usage(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(model=TINY, messages=MESSAGES, max_tokens=16, temperature=0)
    chunks = list(
        client.chat.completions.create(
            model=TINY,
            messages=MESSAGES,
            max_tokens=16,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    assert len({c.id for c in chunks}) == 1
    assert len({c.created for c in chunks}) == 1
    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == whole.choices[0].message.content
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == whole.choices[0].finish_reason
    assert chunks[-1].choices == []
    assert chunks[-1].usage == whole.usage or chunks[-1].usage is not None
    assert all(c.usage is None for c in chunks[:-1])


def test_completions_n_seed_stop_and_logprobs(client: openai.OpenAI) -> None:
    sampling = {"max_tokens": 8, "temperature": 1.0, "seed": 5, "n": 2, "logprobs": 2}
    options: Any = {"model": TINY, "prompt": "abc", **sampling}
    first = client.completions.create(**options)
    again = client.completions.create(**options)
    assert [c.text for c in first.choices] == [c.text for c in again.choices]
    assert first.choices[0].text != first.choices[1].text
    logprobs = first.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.token_logprobs is not None
    assert all(p is not None and p <= 0 for p in logprobs.token_logprobs)
    text = client.completions.create(model=TINY, prompt="abc", max_tokens=24, temperature=0).choices[0].text
    stop = text[3]
    stopped = client.completions.create(model=TINY, prompt="abc", max_tokens=24, temperature=0, stop=[stop])
    assert stopped.choices[0].text == text[: text.index(stop)]
    assert stopped.choices[0].finish_reason == "stop"


def test_chat_logprobs_are_those_of_the_text(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model=TINY, messages=MESSAGES, max_tokens=6, temperature=0, logprobs=True, top_logprobs=3
    )
    content = answer.choices[0].logprobs
    assert content is not None
    assert content.content is not None
    for token in content.content:
        assert len(token.top_logprobs) == 3
        assert token.logprob == max(t.logprob for t in token.top_logprobs)


PERSON: Any = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}
LOOK_UP: Any = {"type": "function", "function": {"name": "look_up", "parameters": PERSON}}
CLOCK: Any = {"type": "function", "function": {"name": "clock"}}


def test_an_answer_obeys_the_schema_that_was_asked_for(client: openai.OpenAI) -> None:
    format_: Any = {"type": "json_schema", "json_schema": {"name": "person", "schema": PERSON, "strict": True}}
    for seed in range(3):
        answer = client.chat.completions.create(
            model=TINY, messages=MESSAGES, max_tokens=200, temperature=1, seed=seed, response_format=format_
        )
        assert answer.choices[0].finish_reason == "stop"
        person = json.loads(answer.choices[0].message.content or "")
        assert person.keys() == {"name", "age"}
        assert 0 <= person["age"] <= 120


def test_a_forced_call_is_a_call(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model=TINY,
        messages=MESSAGES,
        max_tokens=300,
        temperature=1,
        seed=1,
        tools=[LOOK_UP, CLOCK],
        tool_choice={"type": "function", "function": {"name": "look_up"}},
    )
    choice = answer.choices[0]
    assert choice.finish_reason == "tool_calls"
    calls: Any = choice.message.tool_calls
    (call,) = calls
    assert call.type == "function"
    assert call.function.name == "look_up"
    assert json.loads(call.function.arguments).keys() == {"name", "age"}
    reply: Any = [
        *MESSAGES,
        choice.message.model_dump(exclude_none=True),
        {"role": "tool", "tool_call_id": call.id, "content": "nobody"},
    ]
    after = client.chat.completions.create(
        model=TINY, messages=reply, tools=[LOOK_UP], tool_choice="none", max_tokens=4, temperature=0
    )
    assert after.choices[0].message.tool_calls is None


def test_a_forced_call_streams_its_arguments(client: openai.OpenAI) -> None:
    with client.chat.completions.stream(
        model=TINY,
        messages=MESSAGES,
        max_tokens=300,
        temperature=1,
        seed=4,
        tools=[LOOK_UP],
        tool_choice="required",
        parallel_tool_calls=False,
    ) as stream:
        events = list(stream)
        final = stream.get_final_completion().choices[0]
    arguments = [e.arguments_delta for e in events if e.type == "tool_calls.function.arguments.delta"]
    assert len(arguments) > 3
    assert final.finish_reason == "tool_calls"
    calls: Any = final.message.tool_calls
    (call,) = calls
    assert "".join(arguments) == call.function.arguments
    assert json.loads(call.function.arguments)["age"] >= 0


def test_models_and_embeddings(client: openai.OpenAI) -> None:
    ids = [m.id for m in client.models.list()]
    assert TINY in ids
    embedder = next(i for i in ids if i != TINY)
    vectors = client.embeddings.create(model=embedder, input=["a cat", "a small cat", "the stock market"]).data
    near = sum(a * b for a, b in zip(vectors[0].embedding, vectors[1].embedding, strict=True))
    far = sum(a * b for a, b in zip(vectors[0].embedding, vectors[2].embedding, strict=True))
    assert near > far


@pytest.mark.parametrize(
    ("change", "error", "param"),
    [
        ({"model": "nobody"}, openai.NotFoundError, "model"),
        ({"max_tokens": -1}, openai.BadRequestError, "max_tokens"),
        ({"messages": [{"role": "user", "content": "x" * 5000}]}, openai.BadRequestError, "messages"),
        ({"extra_body": {"flavour": "mint"}}, openai.BadRequestError, "flavour"),
        ({"tools": [{"type": "function", "function": {}}]}, openai.BadRequestError, "tools[0].function.name"),
        ({"messages": []}, openai.BadRequestError, "messages"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "banana"}}}},
            openai.BadRequestError,
            "response_format",
        ),
    ],
)
def test_a_bad_request_is_an_error_that_names_the_field(
    client: openai.OpenAI, change: dict[str, object], error: type[openai.APIStatusError], param: str
) -> None:
    options: Any = {"model": TINY, "messages": MESSAGES, "max_tokens": 4, **change}
    with pytest.raises(error) as raised:
        client.chat.completions.create(**options)
    assert raised.value.param == param
    assert raised.value.response.headers["x-request-id"]


def test_a_wrong_key_is_refused(mesh: Mesh) -> None:
    with openai.OpenAI(base_url=f"{mesh.http}/v1", api_key="ck-wrong", max_retries=0) as stranger:
        with pytest.raises(openai.AuthenticationError):
            stranger.models.list()


def test_broken_json_and_a_huge_body_are_refused(mesh: Mesh) -> None:
    headers = {"Authorization": f"Bearer {_key(mesh)}", "Content-Type": "application/json"}
    url = f"{mesh.http}/v1/chat/completions"
    broken = httpx.post(url, content=b'{"model": ', headers=headers, trust_env=False)
    assert broken.status_code == httpx.codes.BAD_REQUEST
    assert broken.json()["error"]["type"] == "invalid_request_error"
    huge = httpx.post(url, content=b" " * (100 << 20), headers=headers, trust_env=False)
    assert huge.status_code == httpx.codes.REQUEST_ENTITY_TOO_LARGE


async def test_the_async_client_streams_many_at_once(mesh: Mesh) -> None:
    texts: list[str] = []

    async def one(client: openai.AsyncOpenAI) -> None:
        stream: Any = await client.chat.completions.create(
            model=TINY, messages=MESSAGES, max_tokens=10, temperature=0, stream=True
        )
        texts.append("".join([c.choices[0].delta.content or "" async for c in stream]))

    async with openai.AsyncOpenAI(base_url=f"{mesh.http}/v1", api_key=_key(mesh), max_retries=0) as client:
        async with anyio.create_task_group() as tasks:
            for _ in range(8):
                tasks.start_soon(one, client)
    assert len(texts) == 8
    assert len(set(texts)) == 1
