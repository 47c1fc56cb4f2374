"""Which turns lean on earlier ones, and how they are spelt out."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from covey.policy.dialogue import TERMS_MAX, leans, spell_out


@pytest.mark.parametrize(
    "text",
    ["Is it treatable?", "What about the cost?", "Why?", "Tell me more", "And in winter?", "How old is he", "thanks"],
)
def test_leaning_turns_are_found(text: str) -> None:
    assert leans(text)


@pytest.mark.parametrize(
    "text", ["What causes throat cancer?", "How do I reset my password?", "List all files in /tmp", "Who wrote Hamlet?"]
)
def test_turns_that_stand_alone_stay_as_they_are(text: str) -> None:
    assert not leans(text)
    assert spell_out(text, ("What is lung cancer?",)).text == text


def test_a_pronoun_gives_way_to_what_it_stands_for() -> None:
    cancer = spell_out("Is it treatable?", ("What is throat cancer?",))
    assert (cancer.text, cancer.resolved) == ("Is throat cancer treatable?", True)
    assert (
        spell_out("What are its symptoms?", ("Tell me about lung cancer.",)).text == "What are lung cancer's symptoms?"
    )
    assert spell_out("Why?", ("What is throat cancer?",)).text == "Why throat cancer"


def test_the_same_words_about_something_else_are_another_text() -> None:
    musk = spell_out("How old is he?", ("Who is the chief of Tesla?",))
    cook = spell_out("How old is he?", ("Who is the chief of Apple?",))
    assert musk.text != cook.text
    assert "tesla" in musk.text


def test_what_only_an_answer_can_have_said_is_not_resolved() -> None:
    turns = ("Write a sorting function.",)
    assert not spell_out("Explain your code above", turns).resolved
    assert not spell_out("What about this?", ("And that?",)).resolved
    assert spell_out("What about this?", ()).resolved  # a first turn leans on nothing


@given(st.text(max_size=60), st.lists(st.text(max_size=40), max_size=20))
def test_any_text_is_spelt_out_the_same_way_each_time(text: str, turns: list[str]) -> None:
    found = spell_out(text, turns)
    assert found == spell_out(text, turns)
    assert found.resolved or found.text == text
    assert len(found.text) <= len(text) + TERMS_MAX * 45 + 10
