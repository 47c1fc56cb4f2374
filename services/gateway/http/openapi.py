"""The OpenAPI description, generated from the schemas that requests are checked with."""

from __future__ import annotations

from typing import Any, Final

import msgspec

from .schema import ChatBody, CompletionBody, EmbeddingsBody, TokenizeBody

_POSTS: Final[dict[str, tuple[type[msgspec.Struct], str]]] = {
    "/v1/chat/completions": (ChatBody, "Answer a conversation"),
    "/v1/completions": (CompletionBody, "Continue a text"),
    "/v1/embeddings": (EmbeddingsBody, "Embed texts"),
    "/tokenize": (TokenizeBody, "Tokens of a text or conversation"),
}
_GETS: Final[dict[str, str]] = {
    "/v1/models": "List models",
    "/v1/models/{model}": "Describe a model",
    "/health": "Whether requests can be served",
    "/livez": "Whether the process is alive",
    "/readyz": "Whether requests can be served",
    "/version": "The version",
    "/metrics": "Prometheus metrics",
}


def _document() -> dict[str, Any]:
    bodies = [body for body, _ in _POSTS.values()]
    refs, components = msgspec.json.schema_components(bodies, ref_template="#/components/schemas/{name}")
    paths: dict[str, Any] = {}
    for (path, (_, summary)), ref in zip(_POSTS.items(), refs, strict=True):
        content = {"application/json": {"schema": ref}}
        paths[path] = {"post": _operation(summary) | {"requestBody": {"required": True, "content": content}}}
    for path, summary in _GETS.items():
        named = [{"name": "model", "in": "path", "required": True, "schema": {"type": "string"}}]
        paths[path] = {"get": _operation(summary) | ({"parameters": named} if "{" in path else {})}
    schemes = {"key": {"type": "http", "scheme": "bearer"}}
    return {
        "openapi": "3.1.0",
        "paths": paths,
        "components": {"schemas": components, "securitySchemes": schemes},
        "security": [{"key": []}],
    }


def _operation(summary: str) -> dict[str, Any]:
    return {"summary": summary, "responses": {"200": {"description": "Success"}, "default": {"description": "Error"}}}


DOCUMENT: Final = _document()
