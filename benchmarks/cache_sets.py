"""The question sets of `covey bench cache`: their texts, which of them mean the same, and their two halves.

Two questions are equal when they stand in one connected component: the same intent (banking77), the same command or
the same normalised English (nl2bash), a common answer and a common content word (nq-open), the pairs of GPTCache's QQP
file (qqp), the same spelt-out question (cast). Problems of gsm8k are each their own. No component is in both halves,
except intents, of which each half has all 77: half of them would be an easier set.
"""

from __future__ import annotations

import csv
import gzip
import json
import re
import tarfile
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import NamedTuple

from covey.errors import NotFound
from covey.policy.reuse_guard import FUNCTION_WORDS

QQP_QUESTIONS = 12_000
"""Questions of the QQP file that are used, whole components at a time; all 44,769 would only take longer."""
SEED = 20_251_029
FEW = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """One question of a stream; those with equal `answer` (within one set) may stand for each other.

    `turns` are the user's turns before it in the same dialogue.
    """

    text: str
    answer: int
    turns: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class QuestionSet:
    """A set in its two halves, each in the order in which it is asked."""

    name: str
    learn: tuple[Question, ...]
    measure: tuple[Question, ...]

    def head(self, most: int) -> QuestionSet:
        """The same set with about `most` questions in each half: whole dialogues, and all that are equal or none."""
        if any(question.turns for question in self.measure):
            return self
        return QuestionSet(name=self.name, learn=_some(self.learn, most), measure=_some(self.measure, most))


def _some(questions: tuple[Question, ...], most: int) -> tuple[Question, ...]:
    answers = Counter(question.answer for question in questions)
    if len(answers) * FEW < len(questions):  # intents: each has many questions, and a part of them is as good
        return questions[:most]
    kept: set[int] = set()
    count = 0
    for question in questions:
        if question.answer not in kept and count < most:
            kept.add(question.answer)
            count += answers[question.answer]
    return tuple(question for question in questions if question.answer in kept)


class Components:
    """Union-find over any keys."""

    def __init__(self) -> None:
        self._parent: dict[Hashable, Hashable] = {}

    def root(self, key: Hashable) -> Hashable:
        """The component's representative; a new key is its own component."""
        parent = self._parent.setdefault(key, key)
        while parent != key:
            self._parent[key] = parent = self._parent[parent]
            key, parent = parent, self._parent[parent]
        return key

    def join(self, left: Hashable, right: Hashable) -> None:
        """Make one component of two."""
        self._parent[self.root(left)] = self.root(right)


def load(data: Path) -> list[QuestionSet]:
    """Read every set that the folder has, always in the same order.

    Raises:
        NotFound: there is none.
    """
    readers: dict[str, Callable[[Path], QuestionSet]] = {
        "banking77": _banking,
        "nl2bash": _nl2bash,
        "gsm8k": _gsm8k,
        "nq-open": _nq_open,
        "gptcache-bench": _qqp,
        "trec-cast": _cast,
    }
    sets = [read(data / folder) for folder, read in readers.items() if (data / folder).is_dir()]
    if not sets:
        raise NotFound(f"{data} has none of the folders {', '.join(readers)}", field="data")
    return sets


def normalised(text: str) -> str:
    """Words and numbers only, in lower case."""
    return " ".join(re.findall(r"[\w/.*$~-]*\w[\w/.*$~-]*|[^\s\w]", text.lower())).rstrip(" .!?")


def _banking(folder: Path) -> QuestionSet:
    rows: list[tuple[str, str]] = []
    for name in ("train.csv", "test.csv"):
        with (folder / name).open(newline="") as file:
            rows += [(row["text"].strip(), row["category"]) for row in csv.DictReader(file)]
    Random(SEED).shuffle(rows)  # noqa: S311 - a reproducible order
    answers = {intent: number for number, intent in enumerate(sorted({intent for _, intent in rows}))}
    questions = [Question(text=text, answer=answers[intent]) for text, intent in rows]
    half = len(questions) // 2
    return QuestionSet(name="banking77", learn=tuple(questions[:half]), measure=tuple(questions[half:]))


def _nl2bash(folder: Path) -> QuestionSet:
    with gzip.open(folder / "all.nl.gz", "rt") as english, gzip.open(folder / "all.cm.gz", "rt") as commands:
        rows = [(nl.strip(), cm.strip()) for nl, cm in zip(english, commands, strict=True)]
    components = Components()
    for nl, cm in rows:
        components.join(("english", normalised(nl)), ("command", " ".join(cm.split())))
    return _halved("nl2bash", [(nl, components.root(("english", normalised(nl)))) for nl, _ in rows])


def _gsm8k(folder: Path) -> QuestionSet:
    lines = (folder / "test.jsonl").read_text().splitlines()
    return _halved("gsm8k", [(json.loads(line)["question"], index) for index, line in enumerate(lines)])


_FUNCTION_WORDS = FUNCTION_WORDS | {"being", "s", "much", "many"}


def _nq_open(folder: Path) -> QuestionSet:
    """Equal answers alone say little ("two", "1988"): the questions must share a content word, too."""
    components, rows = Components(), []
    for name in ("NQ-open.dev.jsonl", "NQ-open.efficientqa.dev.1.1.jsonl"):
        for line in (folder / name).read_text().splitlines():
            row = json.loads(line)
            question = row["question"]
            rows.append(question)
            for answer in row["answer"]:
                for word in set(normalised(question).split()) - _FUNCTION_WORDS:
                    components.join(question, (normalised(answer), word))
    return _halved("nq-open", [(question, components.root(question)) for question in rows])


def _qqp(folder: Path) -> QuestionSet:
    with tarfile.open(folder / "similiar_qqp.json.gz") as archive:
        member = next(member for member in archive.getmembers() if member.isfile())
        file = archive.extractfile(member)
        pairs = json.load(file) if file is not None else []
    components = Components()
    for pair in pairs:
        components.join(pair["origin"], pair["similar"])
    texts = list(dict.fromkeys(text for pair in pairs for text in (pair["origin"], pair["similar"])))
    return _halved("qqp", [(text, components.root(text)) for text in texts], most=QQP_QUESTIONS)


def _cast(folder: Path) -> QuestionSet:
    """Each dialogue is held three times, in random order, each turn after the ones before it.

    The first user says it as recorded. The second says each turn as recorded or, by the toss of a coin, as the
    annotators spelt it out. The third asks about another topic: its first turn, then this topic's follow-ups whose
    pronoun the annotators had to replace ("is it treatable?"); what these mean now, nobody else has asked.
    """
    rng = Random(SEED)  # noqa: S311 - a reproducible stream
    dialogues = _dialogues(folder)
    rng.shuffle(dialogues)
    answers: dict[str, int] = {}
    halves: list[tuple[Question, ...]] = []
    for half in (dialogues[: len(dialogues) // 2], dialogues[len(dialogues) // 2 :]):
        played = list(half)
        played += [[Turn(rng.choice(turn), turn.meaning) for turn in dialogue] for dialogue in half]
        for dialogue, other in zip(half, half[1:] + half[:1], strict=True):
            asked = [Turn(turn.said, f"{turn.meaning} @ {other[0].meaning}") for turn in dialogue if turn.has_pronoun]
            played.append([other[0], *asked])
        rng.shuffle(played)
        questions: list[Question] = []
        for dialogue in played:
            for number, turn in enumerate(dialogue):
                answer = answers.setdefault(normalised(turn.meaning), len(answers))
                before = tuple(earlier.said for earlier in dialogue[:number])
                questions.append(Question(text=turn.said, answer=answer, turns=before))
        halves.append(tuple(questions))
    return QuestionSet(name="cast", learn=halves[0], measure=halves[1])


class Turn(NamedTuple):
    """What a user said, and the same as the annotators spelt it out."""

    said: str
    meaning: str

    @property
    def has_pronoun(self) -> bool:
        """Whether it has a pronoun that the annotators replaced."""
        return len(_PRONOUNS & _words(self.said)) > len(_PRONOUNS & _words(self.meaning))


_PRONOUNS = frozenset(
    ["it", "its", "they", "them", "their", "he", "him", "his", "she", "her", "this", "that", "these", "those"]
)


def _words(text: str) -> set[str]:
    return set(re.findall(r"[a-z]+", text.lower()))


def _dialogues(folder: Path) -> list[list[Turn]]:
    resolved = dict(
        line.split("\t", 1)
        for line in (folder / "evaluation_topics_annotated_resolved_v1.0.tsv").read_text().splitlines()
    )
    dialogues: list[list[Turn]] = []
    for name in (
        "evaluation_topics_v1.0.json",
        "2020_manual_evaluation_topics_v1.0.json",
        "2021_manual_evaluation_topics_v1.0.json",
    ):
        for topic in json.loads((folder / name).read_text()):
            turns: list[Turn] = []
            for turn in topic["turn"]:
                spelt = turn.get("manual_rewritten_utterance") or resolved[f"{topic['number']}_{turn['number']}"]
                turns.append(Turn(turn["raw_utterance"].strip(), spelt.strip()))
            dialogues.append(turns)
    return dialogues


def _halved(name: str, rows: Sequence[tuple[str, Hashable]], *, most: int | None = None) -> QuestionSet:
    """Deal whole components into two halves, up to `most` rows in all, and shuffle each."""
    rng = Random(SEED)  # noqa: S311 - a reproducible split
    members: dict[Hashable, list[str]] = {}
    for text, answer in rows:
        members.setdefault(answer, []).append(text)
    order = list(members)
    rng.shuffle(order)
    halves: tuple[list[Question], list[Question]] = ([], [])
    for number, answer in enumerate(order):
        shorter = min(halves, key=len)
        if most is not None and len(shorter) >= most // 2:
            break
        shorter += [Question(text=text.strip(), answer=number) for text in members[answer]]
    for half in halves:
        rng.shuffle(half)
    return QuestionSet(name=name, learn=tuple(halves[0]), measure=tuple(halves[1]))


def texts_of(sets: Iterable[QuestionSet]) -> list[str]:
    """Every text once, in order of appearance."""
    return list(dict.fromkeys(question.text for one in sets for half in (one.learn, one.measure) for question in half))
