"""`--model` in every form that a person writes it."""

from __future__ import annotations

import pytest

from covey.cli.models import DEFAULT, parse_models
from covey.errors import InvalidArgument


@pytest.mark.parametrize(
    ("texts", "local", "remote"),
    [
        ((), {DEFAULT: DEFAULT}, {}),
        (("smollm2",), {"smollm2": "smollm2"}, {}),
        (("models/tiny.gguf",), {"tiny": "models/tiny.gguf"}, {}),
        (("/models/llama-3b",), {"llama-3b": "/models/llama-3b"}, {}),
        (("writer=/models/llama",), {"writer": "/models/llama"}, {}),
        (("big=https://host.example/v1",), {}, {"big": "https://host.example/v1"}),
        (("a=smollm2", "b=http://127.0.0.1:9/v1"), {"a": "smollm2"}, {"b": "http://127.0.0.1:9/v1"}),
    ],
)
def test_forms(texts: tuple[str, ...], local: dict[str, str], remote: dict[str, str]) -> None:
    assert parse_models(texts) == (local, remote)


@pytest.mark.parametrize("texts", [("smollm2", "smollm2"), ("x=a", "x=https://host.example/v1"), ("/a/m", "/b/m.gguf")])
def test_a_name_stands_for_one_model(texts: tuple[str, ...]) -> None:
    with pytest.raises(InvalidArgument, match="--model other=") as caught:
        parse_models(texts)
    assert caught.value.field == "model"
