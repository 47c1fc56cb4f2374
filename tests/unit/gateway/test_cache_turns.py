"""What the gateway tells semcache of a dialogue: the user's earlier turns, or the whole history as context."""

from __future__ import annotations

from functools import partial

from covey.testing import assert_eventually
from covey.types.generate import Role
from covey.types.semcache import CacheQuery
from tests.support.fake_mesh import MODEL, FakeSemCache, FakeWorker
from tests.support.http_edge import http_edge

DIALOGUE = [("user", "What is throat cancer?"), ("assistant", "A tumour."), ("user", "Is it treatable?")]


async def offered(*dialogues: list[tuple[str, str]]) -> list[CacheQuery]:
    async with http_edge() as edge:
        await edge.mesh.add(FakeWorker(name="d", role=Role.DECODE))
        cache = await edge.mesh.add_semcache(FakeSemCache())
        for number, dialogue in enumerate(dialogues, start=1):
            messages = [{"role": role, "content": content} for role, content in dialogue]
            body = {"model": MODEL, "messages": messages, "temperature": 0}
            reply = await edge.http.post("/v1/chat/completions", json=body)
            assert reply.status_code == 200, reply.text
            await assert_eventually(partial(_has, cache, number))
    return [offer.query for offer in cache.offers]


def _has(cache: FakeSemCache, offers: int) -> bool:
    return len(cache.offers) == offers


async def test_a_turn_that_the_users_own_explain_goes_with_these_and_without_the_answers() -> None:
    other = [DIALOGUE[0], ("assistant", "A kind of cancer."), DIALOGUE[2]]
    first, second = await offered(DIALOGUE, other)
    assert (first.text, first.turns) == ("Is it treatable?", ("What is throat cancer?",))
    assert first.context_key == second.context_key
    assert first.exact_key != second.exact_key


async def test_a_turn_about_an_answer_keeps_the_whole_history_in_its_context() -> None:
    about = ("user", "Explain your answer above")
    first, second = await offered([*DIALOGUE[:2], about], [DIALOGUE[0], ("assistant", "Other."), about])
    assert first.turns == second.turns == ()
    assert first.context_key != second.context_key


async def test_another_system_prompt_is_another_context() -> None:
    plain, told = await offered(DIALOGUE, [("system", "Be brief."), *DIALOGUE])
    assert plain.turns == told.turns
    assert plain.context_key != told.context_key
