"""The real encoder, loaded once a session."""

from __future__ import annotations

import socket
from typing import Any

import pytest

from services.semcache.minilm import PACKAGED, SentenceModel, find_model


@pytest.fixture(scope="session")
def sentence_model() -> SentenceModel:
    """The packaged all-MiniLM-L6-v2, loaded without so much as looking up a name in the network."""
    asked: list[Any] = []

    def refuse(*args: Any, **_: Any) -> Any:
        asked.append(args)
        raise OSError("no network in this test")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket, "getaddrinfo", refuse)
        patch.setattr(socket.socket, "connect", refuse)
        model = SentenceModel(find_model(PACKAGED), threads=1, batch_max=8)
        model.encode(["first use"])
    assert not asked
    return model
