"""The real encoder, loaded once a session."""

from __future__ import annotations

import pytest

from services.semcache.minilm import PACKAGED, SentenceModel, find_model


@pytest.fixture(scope="session")
def sentence_model() -> SentenceModel:
    """The packaged all-MiniLM-L6-v2."""
    return SentenceModel(find_model(PACKAGED), threads=1, batch_max=8)
