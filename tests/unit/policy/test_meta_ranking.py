"""Meta Ranking: votes, both orders, references of both kinds; and the detector of personal data."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from covey.policy.meta_ranking import Comparison, MetaRanking, Reference, choose_references
from covey.policy.personal_data import personal_data

GOOD, BAD = Reference(id="good", reliable=True), Reference(id="bad", reliable=False)


def _says(reference: Reference, first: int | None, second: int | None = None) -> Comparison:
    return Comparison(reference=reference, first=first, second=second)


def test_better_than_good_is_reliable_and_worse_than_bad_is_not() -> None:
    ranking = MetaRanking()
    assert ranking.judge([_says(GOOD, 1, 1)] * 3).reliable is True
    assert ranking.judge([_says(BAD, -1, -1)] * 3).reliable is False


def test_better_than_bad_and_worse_than_good_say_nothing() -> None:
    assert MetaRanking().judge([_says(BAD, 1, 1), _says(GOOD, -1, -1), _says(BAD, 1, 1)]).score == 0.0


def test_a_judge_that_prefers_what_stands_first_changes_nothing() -> None:
    biased = [_says(GOOD, 1, -1), _says(BAD, 1, -1), _says(GOOD, 1, -1), _says(BAD, 1, -1)]
    assert MetaRanking().judge(biased).score == 0.0


def test_too_few_verdicts_are_no_judgement() -> None:
    found = MetaRanking(votes_min=3).judge([_says(GOOD, 1), _says(GOOD, 1), _says(GOOD, None)])
    assert (found.votes, found.reliable) == (2, None)


@given(st.lists(st.tuples(st.booleans(), st.sampled_from([-1, 0, 1, None]), st.floats(0.1, 5)), max_size=12))
def test_scores_stay_in_their_range_and_better_verdicts_never_hurt(votes: list[tuple[bool, int | None, float]]) -> None:
    def judged(raise_by: int) -> float:
        return (
            MetaRanking()
            .judge(
                _says(
                    Reference(id=str(i), reliable=reliable, weight=weight), None if v is None else min(1, v + raise_by)
                )
                for i, (reliable, v, weight) in enumerate(votes)
            )
            .score
        )

    assert -1.0 <= judged(0) <= judged(1) <= 1.0


def test_theta_is_learnt_from_answers_whose_worth_is_known() -> None:
    ranking = MetaRanking()
    theta = ranking.learn([(0.1, False), (0.2, False), (0.5, True), (0.9, True)])
    assert 0.2 < theta < 0.5
    assert ranking.learn([(0.1, True)]) == theta, "one kind alone teaches nothing"


def test_references_are_near_and_of_both_kinds() -> None:
    known = [(Reference(id=f"g{i}", reliable=True), 0.9 - i / 100) for i in range(8)]
    known += [(Reference(id=f"b{i}", reliable=False), 0.2 - i / 100) for i in range(2)]
    assert [reference.id for reference in choose_references(known)] == ["g0", "b0", "g1", "b1", "g2"]


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("write to jane.doe@example.org", "an e-mail address"),
        ("call +44 20 7946 0958 tomorrow", "a phone number"),
        ("my card is 4111 1111 1111 1111", "a card number"),
        ("DE89 3704 0044 0532 0130 00 please", "an account number"),
        ("host 192.168.1.20 is down", "an IP address"),
        ("my name is Sarah and I", "a person"),
        ("Dear Dr. Miller", "a person"),
        ("password: hunter2", "a secret"),
        ("SSN 078-05-1120", "a social security number"),
    ],
)
def test_forms_of_personal_data_are_seen(text: str, what: str) -> None:
    assert personal_data(text) == what


@pytest.mark.parametrize(
    "text", ["find files larger than 300 MB", "print 1 2 3 4 5", "version 3.11.7 of python", "in 2024 it was 4.5", ""]
)
def test_ordinary_texts_are_not_personal(text: str) -> None:
    assert personal_data(text) == ""
