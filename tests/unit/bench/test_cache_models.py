"""`covey bench cache --part examples`: what counts as a right command, and that no half holds the other's answers."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest

from benchmarks.meta_ranking import Target, _parted
from benchmarks.meta_ranking import _add as _errors
from benchmarks.nl2bash_examples import Task, _add, first_command, halves, likeness, plain
from benchmarks.report import Report


def test_equal_english_and_equal_commands_stay_in_one_half(tmp_path: Path) -> None:
    english = ["List files.", "list files", "Show all files", "Remove x", "Count lines", "Print y"]
    commands = ["ls", "ls  -a", "ls -a", "rm x", "wc -l", 'echo "y"']
    for name, lines in (("all.nl.gz", english), ("all.cm.gz", commands)):
        with gzip.open(tmp_path / name, "wt") as file:
            file.write("\n".join(lines) + "\n")
    known, asked = halves(tmp_path)
    assert {task.english for task in (*known, *asked)} == {"List files.", *english[2:]}
    sides = [{plain(one) for task in half for one in task.commands} for half in (known, asked)]
    assert not sides[0] & sides[1]
    assert sides[0]
    assert sides[1]
    assert next(task for task in (*known, *asked) if task.english == "List files.").commands == ("ls", "ls  -a")


@pytest.mark.parametrize(
    ("answer", "command"),
    [
        ("ls -l", "ls -l"),
        ("```bash\nls -l\n```", "ls -l"),
        ("You can use this:\n\n$ ls -l\nIt lists.", "ls -l"),
        ("#!/bin/bash\n`ls -l`", "ls -l"),
        ("```", ""),
    ],
)
def test_the_command_of_an_answer(answer: str, command: str) -> None:
    assert first_command(answer) == command


def test_likeness_is_one_for_equal_words_and_none_for_other_ones() -> None:
    assert likeness("grep 'a'  b", 'grep "a" b') == 1.0
    assert likeness("ls", "rm") == 0.0
    assert 0.0 < likeness("ls -l x", "ls -a x") < 1.0


def test_the_difference_is_reported_with_its_sign() -> None:
    report = Report("cache")
    tasks = [Task(english=str(i), commands=("ls -a", "ls")) for i in range(4)]
    _add(report, tasks, {"without examples": ["ls"] * 4, "with examples": ["ls", "ls -a", "rm", "rm"]})
    found = {(row.system, row.metric): row for row in report.rows}
    assert found["difference", "right"].value == -0.5
    assert found["difference", "right"].lo < -0.5 < found["difference", "right"].hi
    assert report.ratios["examples/nl2bash/without"] == 0.5


def test_thresholds_are_set_where_right_and_wrong_answers_are_as_common_as_where_they_are_measured() -> None:
    judged = [Target(right=i < 9, scores={"covey": 1.0 if i < 9 else -1.0}) for i in range(12)]
    learnt, measured = _parted(judged)
    assert ([target.right for target in learnt].count(False), len(learnt)) == (1, 4)
    assert len(measured) == 8
    report = Report("cache")
    _errors(report, "covey", learnt, measured)
    assert {row.metric: row.value for row in report.rows} == {"precision": 1.0, "recall": 1.0}
