"""`covey bench cache`: who counts as equal, what a rule gives, what is within the budget, the names of ratios."""

from __future__ import annotations

import csv
import gzip
import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks.cache_figures import Figures, System
from benchmarks.cache_ours import Played, learn, play, policies
from benchmarks.cache_rules import Stream, best_setting, play_ageing, play_threshold
from benchmarks.cache_sets import Question, load
from benchmarks.drivers.questions import FALSE, MISS, RIGHT
from benchmarks.report import Report
from covey.errors import NotFound

VECTORS = {"a": (1.0, 0.0), "a2": (0.96, 0.28), "b": (0.0, 1.0), "b2": (0.28, 0.96), "c": (0.8, 0.6)}


def vector(text: str) -> np.ndarray | None:
    return np.array(VECTORS[text], dtype=np.float32) if text in VECTORS else None


def stream(*asked: tuple[str, int]) -> Stream:
    questions = [Question(text=text, answer=answer) for text, answer in asked]
    return Stream("set", questions, [question.text for question in questions], vector)


def test_sets_join_what_is_equal_and_halve_whole_components(tmp_path: Path) -> None:
    (tmp_path / "nl2bash").mkdir()
    english = ["List files.", "list files", "Show all files", "Remove x", "Count lines", "Print y"]
    commands = ["ls", "ls -a", "ls -a", "rm x", "wc -l", "echo y"]
    for name, lines in (("all.nl.gz", english), ("all.cm.gz", commands)):
        with gzip.open(tmp_path / "nl2bash" / name, "wt") as file:
            file.write("\n".join(lines) + "\n")
    (found,) = load(tmp_path)
    answers = {question.text: question.answer for question in (*found.learn, *found.measure)}
    assert answers["List files."] == answers["list files"] == answers["Show all files"]
    assert len(set(answers.values())) == 4
    assert not {question.answer for question in found.learn} & {question.answer for question in found.measure}
    (tmp_path / "banking77").mkdir()
    for name in ("train.csv", "test.csv"):
        with (tmp_path / "banking77" / name).open("w", newline="") as file:
            csv.writer(file).writerows([("text", "category"), ("my card", "card"), ("my pin", "pin")])
    assert [one.name for one in load(tmp_path)] == ["banking77", "nl2bash"]
    with pytest.raises(NotFound):
        load(tmp_path / "banking77")


def test_a_threshold_serves_the_nearest_kept_question() -> None:
    asked = stream(("a", 1), ("a2", 1), ("b", 2), ("c", 3), ("too long", 4), ("a", 5))
    assert play_threshold(asked, 0.9).tolist() == [MISS, RIGHT, MISS, MISS, MISS, FALSE]
    assert play_threshold(asked, 0.7).tolist() == [MISS, RIGHT, MISS, FALSE, MISS, FALSE]


def test_the_best_setting_is_within_the_budget() -> None:
    asked = stream(*[("a", 1)] * 120, ("c", 3))
    best = best_setting({"last": [asked]}, (0.99, 0.9, 0.7), play_threshold)
    assert (best.setting, best.right) == (0.99, 119)
    hopeless = stream(("a", 1), ("a", 2))
    assert best_setting({"last": [hopeless]}, (0.99,), play_threshold).key == "none"


def test_an_age_limit_that_hits_renew_serves_what_is_stale() -> None:
    asked = stream(*[("a", 1)] * 10)
    versions = [0] * 5 + [1] * 5
    fixed, stale = play_ageing(asked, 0.9, versions, ttl=5, slides=False)
    assert (int((fixed == RIGHT).sum()), stale) == (8, 0)
    renewed, stale = play_ageing(asked, 0.9, versions, ttl=5, slides=True)
    assert (int((renewed == RIGHT).sum()), stale) == (4, 5)


async def test_semcache_itself_is_what_is_measured() -> None:
    questions = [Question(text=text, answer=answer) for text, answer in (("a", 1), ("a", 1), ("b", 2), ("a2", 7))]
    learnt = learn(questions, vector)
    played = await play("set", questions, policies({"set": learnt}), vector, dim=2)
    assert played.outcomes.tolist() == [MISS, RIGHT, MISS, MISS]  # nothing learnt: equal requests only
    assert len(played.lookup_s) == 4


def test_ratios_have_the_agreed_names() -> None:
    figures = Figures({"banking77": 4, "gsm8k": 2}, "cast")
    for system, hits in ((System.COVEY, [1, 1, 1, 0]), (System.UNIFORM, [1, 0, 0, 2]), (System.GPTCACHE, [0, 0, 0, 0])):
        outcomes = {"banking77": np.array(hits, np.int8), "gsm8k": np.zeros(2, np.int8)}
        figures.add(system, {name: Played(outcomes=one, lookup_s=[0.1]) for name, one in outcomes.items()})
    report = Report("cache")
    figures.write(report)
    assert report.ratios["right_hits/banking77/uniform"] == report.ratios["right_hits/all/uniform"] == 3.0
    assert report.ratios["right_hits/all/gptcache"] == 3.0
    assert "right_hits/gsm8k/uniform" not in report.ratios
    assert report.value(case="banking77", system="uniform", metric="false_hits") == 25.0
    json.loads(report.json())
