"""A streamed chat as the command line reads it: chunks as they come, errors in the mesh's own words."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

from covey.cli.chat import delta_text, stream_chat
from covey.errors import Unavailable

BODY = {"model": "m", "messages": [{"role": "user", "content": "hello"}]}
ERROR = {
    "error": {"message": "no worker serves 'm' now", "type": "server_error", "param": "model", "code": "UNAVAILABLE"}
}


def client_of(status: int, text: str, seen: list[dict[str, Any]]) -> httpx.AsyncClient:
    def answer(request: httpx.Request) -> httpx.Response:
        seen.append(json.loads(request.content))
        return httpx.Response(status, text=text)

    return httpx.AsyncClient(base_url="http://mesh", transport=httpx.MockTransport(answer))


def chunk(text: str) -> str:
    return f"data: {json.dumps({'choices': [{'index': 0, 'delta': {'content': text}}]})}\n\n"


async def test_chunks_come_in_order_and_comments_are_skipped() -> None:
    seen: list[dict[str, Any]] = []
    text = chunk("Hel") + ": heartbeat\n\n" + chunk("lo") + "data: [DONE]\n\n"
    async with client_of(200, text, seen) as client:
        pieces = [delta_text(each) async for each in stream_chat(client, BODY)]
    assert pieces == ["Hel", "lo"]
    assert seen == [{**BODY, "stream": True, "stream_options": {"include_usage": True}}]


async def test_a_refusal_is_told_in_the_meshs_words() -> None:
    async with client_of(503, json.dumps(ERROR), []) as client:
        with pytest.raises(Unavailable, match="no worker serves 'm' now"):
            [each async for each in stream_chat(client, BODY)]


async def test_an_error_inside_the_stream_ends_it() -> None:
    pieces = []
    async with client_of(200, chunk("Hel") + f"data: {json.dumps(ERROR)}\n\n", []) as client:
        with pytest.raises(Unavailable, match="no worker serves"):
            async for each in stream_chat(client, BODY):
                pieces.append(delta_text(each))
    assert pieces == ["Hel"]


def test_a_chunk_of_usage_alone_has_no_text() -> None:
    assert delta_text({"choices": []}) == ""
    assert delta_text({"choices": [{"delta": {"role": "assistant", "content": None}}]}) == ""
