"""A fake mesh behind a real HTTP server, with clients of it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import httpx
import openai

from services.gateway.config import Config
from services.gateway.http.server import serve_http
from tests.support.fake_mesh import API_KEY, FakeMesh, fake_mesh


class Edge:
    """The HTTP edge of a fake mesh at `url`."""

    def __init__(self, mesh: FakeMesh, address: str, http: httpx.AsyncClient) -> None:
        self.mesh = mesh
        self.address = address
        self.url = f"http://{address}"
        self.http = http

    def openai(self) -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(base_url=f"{self.url}/v1", api_key=API_KEY, max_retries=0)


@asynccontextmanager
async def http_edge(config: Config | None = None) -> AsyncIterator[Edge]:
    """Add workers to `edge.mesh`; requests of `edge.http` carry the API key."""
    async with fake_mesh() as mesh:
        gateway = await mesh.gateway(config)
        async with (
            serve_http(gateway.app, "127.0.0.1:0", drain_s=2.0) as address,
            httpx.AsyncClient(
                base_url=f"http://{address}", headers={"authorization": f"Bearer {API_KEY}"}, timeout=20.0
            ) as http,
        ):
            yield Edge(mesh, address, http)
