"""The encoder before, while and after it loads; one contract for the real model and its double."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path

import anyio
import numpy as np
import pytest

from covey.errors import InvalidArgument, Unavailable
from covey.net.rpc import Call
from covey.testing import VirtualClock, assert_eventually
from covey.types.program import CacheOutcome, EmbedRequest
from covey.types.semcache import InvalidateRequest
from services.semcache import minilm
from services.semcache.minilm import PACKAGED, Encoded, EncoderModel, SentenceModel, find_model, verify
from tests.support.semcache import ACME, BagOfWords, offer, query, running_cache


def call(remaining_s: float) -> Call:
    return Call(headers={}, request_id="r", peer="test", time_left=lambda: remaining_s)


class Gate:
    """A model whose loading the test holds up."""

    def __init__(self) -> None:
        self.opened = threading.Event()

    def load(self) -> EncoderModel:
        assert self.opened.wait(30)
        return BagOfWords()


async def test_the_exact_tier_works_before_the_encoder_and_the_semantic_one_says_so(clock: VirtualClock) -> None:
    gate = Gate()
    async with running_cache(clock, load=gate.load, wait=False) as parts:
        try:
            asked = query("the opening hours", exact=b"k")
            assert (await parts.cache.lookup(asked, timeout_s=1.0)).outcome is CacheOutcome.MISS
            assert (await parts.cache.offer(offer(asked), timeout_s=1.0)).stored
            assert (await parts.cache.lookup(asked, timeout_s=1.0)).outcome is CacheOutcome.EXACT
            semantic = query("the opening hours")
            assert (await parts.cache.lookup(semantic, timeout_s=1.0)).outcome is CacheOutcome.OFF
            refused = await parts.cache.offer(offer(semantic), timeout_s=1.0)
            assert (refused.stored, refused.why) == (False, "the encoder is still loading")
            assert "still loading" in (await parts.cache.explain(semantic, timeout_s=1.0)).why
            assert not parts.cache.stats().encoder_ready
            with pytest.raises(Unavailable) as caught:
                await parts.servicer.embed(EmbedRequest(model=PACKAGED, inputs=("x",)), call(0.1))
            assert caught.value.retry_after_ms
        finally:
            gate.opened.set()
        await assert_eventually(lambda: parts.embedder.ready)
        assert (await parts.cache.offer(offer(semantic), timeout_s=1.0)).stored
        assert (await parts.cache.lookup(semantic, timeout_s=1.0)).outcome is CacheOutcome.SEMANTIC


async def test_embed_waits_for_the_encoder_under_its_deadline(clock: VirtualClock) -> None:
    gate = Gate()
    async with running_cache(clock, load=gate.load, wait=False) as parts, anyio.create_task_group() as tg:
        got: list[int] = []

        async def embed() -> None:
            got.append(len((await parts.servicer.embed(EmbedRequest(model=PACKAGED, inputs=("x",)), call(30))).vectors))

        tg.start_soon(embed)
        await anyio.lowlevel.checkpoint()
        assert not got
        gate.opened.set()
        await assert_eventually(lambda: got == [1])


async def test_a_broken_encoder_costs_only_the_semantic_tier(clock: VirtualClock) -> None:
    def load() -> EncoderModel:
        raise OSError("unreadable")

    async with running_cache(clock, load=load) as parts:
        asked = query("hi", exact=b"k")
        assert (await parts.cache.offer(offer(asked), timeout_s=1.0)).stored
        assert (await parts.cache.lookup(asked, timeout_s=1.0)).outcome is CacheOutcome.EXACT
        with pytest.raises(Unavailable, match="unreadable"):
            await parts.servicer.embed(EmbedRequest(model=PACKAGED, inputs=("x",)), call(1))


async def test_a_late_encoder_is_a_miss_within_the_look_ups_share(clock: VirtualClock) -> None:
    class Slow(BagOfWords):
        def __init__(self) -> None:
            self.hold = threading.Event()

        def encode(self, texts: Sequence[str]) -> list[Encoded]:
            assert self.hold.wait(30)
            return super().encode(texts)

    slow = Slow()
    async with running_cache(clock, load=lambda: slow) as parts:
        try:
            with anyio.fail_after(2):
                reply = await parts.cache.lookup(query("hi", exact=b"k"), timeout_s=0.05)
            assert reply.outcome is CacheOutcome.MISS
        finally:
            slow.hold.set()


async def test_a_text_that_breaks_the_model_costs_one_miss_and_the_encoder_comes_back(clock: VirtualClock) -> None:
    class Touchy(BagOfWords):
        def encode(self, texts: Sequence[str]) -> list[Encoded]:
            if "poison" in texts:
                raise RuntimeError("boom")
            return super().encode(texts)

    async with running_cache(clock, load=Touchy) as parts:
        assert (await parts.cache.lookup(query("poison", exact=b"k"), timeout_s=5.0)).outcome is CacheOutcome.MISS
        assert (await parts.embedder.many(("fine",), timeout_s=5.0))[0].vector is not None
        await assert_eventually(lambda: parts.embedder.ready)


async def test_texts_are_encoded_once_a_tenant(clock: VirtualClock) -> None:
    seen: list[str] = []

    class Counting(BagOfWords):
        def encode(self, texts: Sequence[str]) -> list[Encoded]:
            seen.extend(texts)
            return super().encode(texts)

    async with running_cache(clock, load=Counting) as parts:
        await parts.cache.lookup(query("hi"), timeout_s=1.0)
        await parts.cache.offer(offer(query("hi")), timeout_s=1.0)
        await parts.embedder.one(ACME, "hi", timeout_s=1.0)
        assert seen == ["hi"]
        await parts.cache.lookup(query("hi", tenant="rival"), timeout_s=1.0)  # type: ignore[arg-type]
        assert seen == ["hi", "hi"]
        await parts.desk.invalidate(InvalidateRequest(tenant=ACME), timeout_s=5.0)
        await parts.cache.lookup(query("hi"), timeout_s=1.0)
        assert seen == ["hi", "hi", "hi"]


async def test_asks_that_wait_are_encoded_together_and_answered_apart(clock: VirtualClock) -> None:
    async with running_cache(clock) as parts, anyio.create_task_group() as tg:
        got: dict[str, Encoded] = {}

        async def one(text: str) -> None:
            (got[text],) = await parts.embedder.many((text,), timeout_s=5)

        for number in range(20):
            tg.start_soon(one, f"text {number}")
        await assert_eventually(lambda: len(got) == 20)
        for text, encoded in got.items():
            (alone,) = BagOfWords().encode([text])
            assert encoded.vector is not None
            assert np.array_equal(encoded.vector, alone.vector)  # type: ignore[arg-type]


def test_a_missing_model_fails_at_once_and_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InvalidArgument, match="nothing is ever downloaded"):
        find_model("sentence-transformers/all-mpnet-base-v2")
    with pytest.raises(InvalidArgument):
        find_model(str(tmp_path))
    monkeypatch.setattr(minilm, "PACKAGE", "no_such_package")
    with pytest.raises(Unavailable, match=r"install covey\[semcache\]"):
        find_model(PACKAGED)


def test_the_packaged_weights_are_the_pinned_ones() -> None:
    verify(find_model(PACKAGED))


@pytest.fixture(params=["double", pytest.param("real", marks=pytest.mark.slow)])
def model(request: pytest.FixtureRequest) -> EncoderModel:
    if request.param == "double":
        return BagOfWords()
    real: EncoderModel = request.getfixturevalue("sentence_model")
    return real


def test_contract_of_a_model(model: EncoderModel) -> None:
    texts = ["a short text", "another one", "A Short Text"]
    encoded = model.encode(texts)
    for item, text in zip(encoded, texts, strict=True):
        assert item.vector is not None
        assert item.vector.shape == (model.dim,)
        assert item.vector.dtype == np.float32
        assert np.linalg.norm(item.vector) == pytest.approx(1.0, abs=1e-5)
        (alone,) = model.encode([text])
        assert alone.vector is not None
        assert float(alone.vector @ item.vector) == pytest.approx(1.0, abs=1e-5)
        assert item.tokens > 0
    too_long, fine = model.encode(["word " * 300, "fine"])
    assert too_long.vector is None
    assert too_long.tokens >= 300
    assert fine.vector is not None
    assert model.encode([]) == []


@pytest.mark.slow
def test_vectors_are_those_of_sentence_transformers_itself(sentence_model: SentenceModel) -> None:
    from sentence_transformers import SentenceTransformer

    texts = ["How do I reset my password?", "¿Dónde está la biblioteca?", "x", "def f(x): return x"]
    reference = SentenceTransformer(str(find_model(PACKAGED)), device="cpu", local_files_only=True).encode(
        texts, normalize_embeddings=True, show_progress_bar=False
    )
    ours = np.stack([item.vector for item in sentence_model.encode(texts) if item.vector is not None])
    assert np.abs(ours - reference).max() < 1e-6
    assert sentence_model.dim == 384
