"""Semantic reuse with the real encoder: what must hit, and what must not although it looks alike."""

from __future__ import annotations

import pytest

from covey.errors import ContextLengthExceeded, InvalidArgument, NotFound, PayloadTooLarge
from covey.policy.reuse import ReuseMode
from covey.testing import VirtualClock
from covey.types.program import CacheOutcome, EmbedRequest
from services.semcache.config import CategoryConfig, Config
from services.semcache.minilm import PACKAGED, SentenceModel
from tests.support.semcache import RIVAL, Parts, offer, query, running_cache
from tests.unit.semcache.test_encoder import call

pytestmark = pytest.mark.slow

FAQ = Config(categories={"faq": CategoryConfig(mode=ReuseMode.SEMANTIC, tau=0.85)}, encode_s=5.0)
UNGUARDED = Config(categories={"faq": CategoryConfig(mode=ReuseMode.SEMANTIC, tau=0.85, guard=False)}, encode_s=5.0)


async def outcome(parts: Parts, stored: str, asked: str) -> CacheOutcome:
    assert (await parts.cache.offer(offer(query(stored)), timeout_s=60.0)).stored
    return (await parts.cache.lookup(query(asked), timeout_s=60.0)).outcome


@pytest.mark.parametrize(
    ("stored", "asked"),
    [
        ("How do I reset my password?", "How can I reset my password"),
        ("What are your opening hours?", "what are the opening hours"),
        ("Where can I find the nearest ATM?", "where is the nearest ATM"),
        ("Why was my card declined?", "Why has my card been declined?"),
    ],
)
async def test_a_paraphrase_hits(clock: VirtualClock, sentence_model: SentenceModel, stored: str, asked: str) -> None:
    async with running_cache(clock, FAQ, load=lambda: sentence_model) as parts:
        assert await outcome(parts, stored, asked) is CacheOutcome.SEMANTIC
        assert (await parts.cache.lookup(query(asked, tenant=RIVAL), timeout_s=60.0)).outcome is CacheOutcome.MISS


@pytest.mark.parametrize(
    ("stored", "asked"),
    [
        ("How do I convert euros to dollars?", "How do I convert dollars to euros?"),
        ("Can I send money from Germany to France?", "Can I send money from France to Germany?"),
        ("Sort the list in ascending order", "Sort the list in descending order"),
        ("What is the fee for transfers over 1000 euros?", "What is the fee for transfers over 5000 euros?"),
        ("Which countries do you support?", "Which countries do you not support?"),
        ("Explain the command 'git pull'", "Explain the command 'git push'"),
    ],
)
async def test_the_guard_stops_what_the_encoder_thinks_equal(
    clock: VirtualClock, sentence_model: SentenceModel, stored: str, asked: str
) -> None:
    async with running_cache(clock, FAQ, load=lambda: sentence_model) as parts:
        assert await outcome(parts, stored, asked) is CacheOutcome.MISS
        assert (await parts.cache.explain(query(asked), timeout_s=60.0)).why.startswith("guard: ")
    async with running_cache(clock, UNGUARDED, load=lambda: sentence_model) as parts:
        assert await outcome(parts, stored, asked) is CacheOutcome.SEMANTIC


async def test_another_question_misses(clock: VirtualClock, sentence_model: SentenceModel) -> None:
    async with running_cache(clock, FAQ, load=lambda: sentence_model) as parts:
        assert await outcome(parts, "How do I reset my password?", "How do I close my account?") is CacheOutcome.MISS


async def test_examples_classify_what_names_no_category(clock: VirtualClock, sentence_model: SentenceModel) -> None:
    config = Config(
        encode_s=5.0,
        categories={
            "bank": CategoryConfig(
                mode=ReuseMode.SEMANTIC,
                tau=0.85,
                examples=("My card was declined", "How do I transfer money?", "Where is the nearest ATM?"),
            ),
            "code": CategoryConfig(
                examples=("Write a Python function that sorts a list", "Why does this C program crash?")
            ),
        },
    )
    async with running_cache(clock, config, load=lambda: sentence_model) as parts:
        for text, category in (
            ("I cannot pay with my card", "bank"),
            ("Write a C function that reverses a string", "code"),
            ("Which mushrooms grow in autumn?", "general"),
        ):
            assert (await parts.cache.explain(query(text, category=""), timeout_s=60.0)).category == category


async def test_embed_counts_tokens_and_refuses_what_it_would_cut(
    clock: VirtualClock, sentence_model: SentenceModel
) -> None:
    async with running_cache(clock, FAQ, load=lambda: sentence_model) as parts:
        inputs = tuple(f"text number {number}" for number in range(20))
        reply = await parts.servicer.embed(EmbedRequest(model=PACKAGED, inputs=inputs), call(60))
        assert [len(vector.values) for vector in reply.vectors] == [384] * 20
        assert all(sum(x * x for x in vector.values) == pytest.approx(1.0, abs=1e-5) for vector in reply.vectors)
        assert reply.prompt_tokens == 20 * 5
        for request, error, field in (
            (EmbedRequest(model=PACKAGED, inputs=("fine", "word " * 300)), ContextLengthExceeded, "input[1]"),
            (EmbedRequest(model=PACKAGED, inputs=("x" * 100_000,)), ContextLengthExceeded, "input[0]"),
            (EmbedRequest(model=PACKAGED, inputs=("x",) * 1025), PayloadTooLarge, "input"),
            (EmbedRequest(model=PACKAGED, inputs=("",)), InvalidArgument, "input[0]"),
            (EmbedRequest(model=PACKAGED, inputs=()), InvalidArgument, "input"),
            (EmbedRequest(model="gpt", inputs=("x",)), NotFound, "model"),
        ):
            with pytest.raises(error) as caught:
                await parts.servicer.embed(request, call(60))
            assert caught.value.field == field
