"""What the service does with what it learns: decisions of a file, relaxed hits, verdicts, look-ups that do not pay."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import anyio
import msgspec
import pytest
import structlog
from click.testing import CliRunner

from covey.actor import Restart, supervise
from covey.errors import DataCorrupt, InvalidArgument, Unavailable
from covey.policy.evidence import FEATURES, Rarity
from covey.policy.reuse import ReuseMode
from covey.policy.reuse_model import DecisionModel
from covey.testing import VirtualClock
from covey.types.program import CacheOutcome
from covey.types.semcache import FeedbackRequest, Verdict
from services.semcache import calibrate
from services.semcache.config import CategoryConfig, Config
from services.semcache.learnt import LearntFile, read_learnt, to_learnt, with_models, write_learnt
from services.semcache.shadow import Sampled, Shadow, dropping
from tests.support.semcache import ACME, BagOfWords, offer, query, running_cache


def decisive(cut: float) -> DecisionModel:
    weights = {"shared words": 10.0}
    return DecisionModel(
        weights=tuple(weights.get(name, 0.0) for name in FEATURES),
        intercept=0.0,
        cut=cut,
        relaxed_cut=cut - 1.0,
        floor=0.1,
        typical=(1.0,) * len(FEATURES),
        rarity=Rarity(10, {3: 4}),
    )


def test_learnt_decisions_survive_their_file(tmp_path: Path) -> None:
    path = tmp_path / "decisions.json"
    write_learnt(path, LearntFile(encoder="words", categories={"faq": to_learnt(decisive(5.0), right=1.0, false=0.5)}))
    models = read_learnt(path, "words")
    assert (models["faq"].weights, models["faq"].cut) == (decisive(5.0).weights, 5.0)
    assert models["faq"].rarity.counts == {3: 4}
    policies = Config(categories={"faq": CategoryConfig(mode=ReuseMode.SEMANTIC)}).policies()
    faq = next(policy for policy in with_models(policies, models, frozenset()) if policy.name == "faq")
    assert faq.model is not None
    assert not faq.guard
    with pytest.raises(InvalidArgument, match="learnt with the encoder words"):
        read_learnt(path, "other")
    with pytest.raises(InvalidArgument, match="cannot read"):
        read_learnt(tmp_path / "none.json", "words")
    path.write_text(path.read_text().replace("shared words", "phase of the moon"))
    with pytest.raises(DataCorrupt, match="learn again"):
        read_learnt(path, "words")
    path.write_text("{")
    with pytest.raises(DataCorrupt):
        read_learnt(path, "words")


async def test_a_learnt_decision_serves_refuses_and_explains(clock: VirtualClock) -> None:
    config = Config(categories={"faq": CategoryConfig(mode=ReuseMode.SEMANTIC)})
    async with running_cache(clock, config, models={"faq": decisive(6.0)}) as parts:
        assert (await parts.cache.offer(offer(query("reset my lost password")), timeout_s=5)).stored
        assert (await parts.cache.lookup(query("reset lost password"), timeout_s=5)).outcome is CacheOutcome.SEMANTIC
        assert (await parts.cache.lookup(query("reset my router"), timeout_s=5)).outcome is CacheOutcome.MISS
        why = (await parts.cache.explain(query("reset my router"), timeout_s=5)).why
        assert "most against it: shared words" in why


async def test_only_a_learnt_decision_crosses_from_one_dialogue_to_another(clock: VirtualClock) -> None:
    asked = replace(query("Is it treatable?"), turns=("What is throat cancer?",))
    other = replace(query("Is it treatable?"), turns=("Hello!", "What is throat cancer?"))
    lungs = replace(query("Is it treatable?"), turns=("What is lung cancer?",))
    config = Config(categories={"faq": CategoryConfig(mode=ReuseMode.SEMANTIC, tau=0.99)})
    for models, crosses in (({"faq": decisive(9.0)}, True), ({}, False)):
        async with running_cache(clock, config, models=models) as parts:
            assert (await parts.cache.offer(offer(asked), timeout_s=5)).stored
            assert (await parts.cache.lookup(asked, timeout_s=5)).outcome is CacheOutcome.SEMANTIC
            assert ((await parts.cache.lookup(other, timeout_s=5)).outcome is CacheOutcome.SEMANTIC) is crosses
            assert (await parts.cache.lookup(lungs, timeout_s=5)).outcome is CacheOutcome.MISS


async def test_load_allows_a_hit_until_the_budget_is_spent(clock: VirtualClock) -> None:
    settings = CategoryConfig(mode=ReuseMode.SEMANTIC, tau=0.95, d_tau=0.5, tau_min=0.5, false_hits_max=0.1)
    async with running_cache(clock, Config(categories={"faq": settings})) as parts:
        stored = await parts.cache.offer(offer(query("reset my lost password")), timeout_s=5)
        near = query("reset my old password")
        assert (await parts.cache.lookup(near, timeout_s=5)).outcome is CacheOutcome.MISS
        clock.advance(1000)
        loaded = await parts.cache.lookup(replace(near, load=9.0), timeout_s=5)
        assert (loaded.outcome, loaded.relaxed) == (CacheOutcome.SEMANTIC, True)
        for _ in range(12):
            parts.cache.judged(
                Sampled(category="faq", entry=stored.entry, asked="a", stored="b", answer="c"), right=False
            )
        assert (await parts.cache.lookup(replace(near, load=9.0), timeout_s=5)).outcome is CacheOutcome.MISS
        stats = next(one for one in parts.cache.stats().categories if one.category == "faq")
        assert (stats.hits, stats.relaxed_hits, stats.judged, stats.false_hits) == (1, 1, 12, 1.0)
        assert 0.5 < stats.false_hits_low < stats.false_hits_high == 1.0


async def test_a_users_verdict_moves_the_estimate(clock: VirtualClock) -> None:
    async with running_cache(clock) as parts:
        for verdict, judged, stale in ((Verdict.RIGHT, 1, 0), (Verdict.STALE, 2, 1), (Verdict.WRONG, 3, 1)):
            entry = (await parts.cache.offer(offer(query("the opening hours")), timeout_s=5)).entry
            hit = await parts.cache.lookup(query("the opening hours"), timeout_s=5)
            assert hit.answer is not None
            await parts.cache.feedback(FeedbackRequest(tenant=ACME, entry=hit.answer.entry, verdict=verdict))
            if verdict is Verdict.RIGHT:
                await parts.cache.feedback(FeedbackRequest(tenant=ACME, entry=entry, verdict=Verdict.STALE))
                continue
            stats = next(one for one in parts.cache.stats().categories if one.category == "faq")
            assert stats.judged == judged + 1
            assert stats.stale_hits == stale + 1


async def test_look_ups_that_do_not_pay_stop_and_are_tried_again(clock: VirtualClock) -> None:
    config = Config(categories={"faq": CategoryConfig(mode=ReuseMode.SEMANTIC)}, pays_after=20)
    async with running_cache(clock, config) as parts:
        account = parts.cache.accounts["faq"].break_even
        for _ in range(25):
            account.looked_up(hit=False, overhead_s=0.02)
            account.answered(model_s=0.1)
        asked = query("the opening hours", exact=b"k")
        assert (await parts.cache.offer(offer(asked), timeout_s=5)).stored
        near = replace(asked, exact_key=b"")
        explained = await parts.cache.explain(near, timeout_s=5)
        assert (explained.mode, "cost more than" in explained.why) == ("exact", True)
        assert (await parts.cache.lookup(asked, timeout_s=5)).outcome is CacheOutcome.EXACT
        outcomes = [(await parts.cache.lookup(near, timeout_s=5)).outcome for _ in range(20)]
        assert outcomes.count(CacheOutcome.SEMANTIC) == 1  # the trial


async def test_an_entry_earns_its_hits_where_a_bound_is_set(clock: VirtualClock) -> None:
    settings = CategoryConfig(mode=ReuseMode.SEMANTIC, tau=0.5, delta=0.2)
    async with running_cache(clock, Config(categories={"faq": settings})) as parts:
        asked = query("reset my lost password")
        entry = (await parts.cache.offer(offer(asked, "press reset"), timeout_s=5)).entry
        for _ in range(40):
            reply = await parts.cache.lookup(asked, timeout_s=5)
            if reply.outcome is CacheOutcome.SEMANTIC:
                break
            again = await parts.cache.offer(offer(asked, "press reset"), timeout_s=5)
            assert not again.stored
            assert entry in again.why
        assert reply.outcome is CacheOutcome.SEMANTIC


async def test_sampled_hits_are_judged_in_the_background() -> None:
    verdicts: list[tuple[str, bool]] = []
    done = anyio.Event()

    class Careful:
        async def judge(self, sampled: Sampled) -> bool | None:
            if sampled.asked == "broken":
                raise Unavailable("no judge today")
            return {"yes": True, "no": False}.get(sampled.asked)

    def take(sampled: Sampled, right: bool) -> None:
        verdicts.append((sampled.asked, right))
        if sampled.asked == "no":
            done.set()

    async with supervise(grace_s=1.0) as supervisor:
        actor = supervisor.start(
            lambda: Shadow(Careful(), take, structlog.get_logger()), name="shadow", capacity=8, restart=Restart()
        )
        sample = dropping(actor)
        for asked in ("broken", "yes", "perhaps", "no"):
            sample(Sampled(category="faq", entry="e", asked=asked, stored="s", answer="a"))
        with anyio.fail_after(5):
            await done.wait()
    assert verdicts == [("yes", True), ("no", False)]


def test_calibrate_writes_what_the_service_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibrate, "SentenceModel", lambda *_, **__: BagOfWords())
    monkeypatch.setattr(calibrate, "find_model", Path)
    topics = ("reset password", "opening hours", "lost card", "change address", "close account", "transfer fee")
    fillers = ("please", "how", "can", "today", "quickly", "now", "help", "soon")
    lines = [
        {"category": "faq", "text": f"{topic} {filler} {other}", "answer": topic}
        for filler in fillers for other in fillers for topic in topics
    ]  # fmt: skip
    questions, decisions = tmp_path / "questions.jsonl", tmp_path / "decisions.json"
    questions.write_bytes(b"\n".join(msgspec.json.encode(line) for line in lines))
    done = CliRunner().invoke(calibrate.main, [str(questions), str(decisions), "--encoder", "words"])
    assert done.exit_code == 0, done.output
    assert "faq: 384 questions" in done.output
    assert read_learnt(decisions, "words")["faq"].floor > 0
    questions.write_text('{"category": "faq"}')
    assert CliRunner().invoke(calibrate.main, [str(questions), str(decisions)]).exit_code == 1
