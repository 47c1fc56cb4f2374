"""The packaged model with examples against without: English to one bash command, right when it is the known one."""

from __future__ import annotations

import gzip
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Final

import anyio
import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import Progress

from benchmarks.cache_sets import Components, normalised
from benchmarks.cache_vectors import VectorFile
from benchmarks.report import Report, Row
from covey.clock import MonotonicClock
from covey.model.plan import Row as ModelRow
from covey.model.plan import SampleSpec, StepPlan
from covey.model.runner import TorchRunner, open_runner
from covey.model.tokenizer import Tokenizer, open_tokenizer
from covey.policy.example_choice import UsefulExample, with_examples
from covey.types.ids import TenantId
from services.semcache.example_pool import ExamplePool

QUERIES, QUICK_QUERIES = 160, 24
QUICK_KNOWN = 1500
EXAMPLES, EXAMPLE_TOKENS = 3, 384
ANSWER_TOKENS: Final = 40
SEQUENCES: Final = 8
BLOCK: Final = 32
BLOCKS_EACH: Final = 32
"""A thousand tokens: all that a request with its examples and its answer may have."""
RESAMPLES = 2000
REQUEST = "Write one bash command that does this, and nothing else: {english}"
CASE = "nl2bash"
OWNER = TenantId("bench")


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """What to do in English, and every command that is known to do it."""

    english: str
    commands: tuple[str, ...]


def measure(
    report: Report, data: Path, vectors: VectorFile, console: Console, *, model: str, cache_dir: Path, quick: bool
) -> None:
    """Add how often, and how nearly, a model writes a known command, shown near tasks of the other half and not.

    Tasks whose English or command is the same are never in both halves, so that no example holds the answer as it is.
    """
    known, asked = halves(data / "nl2bash")
    known = known[:QUICK_KNOWN] if quick else known
    asked = [task for task in asked if len(task.english) < 400][: QUICK_QUERIES if quick else QUERIES]
    with Progress(console=console) as progress:
        vectors.fill([task.english for task in (*known, *asked)], progress)
        pool = anyio.run(_filled, known, vectors)
        bare = [REQUEST.format(english=task.english) for task in asked]
        shown = [_shown(pool, text, task, vectors) for text, task in zip(bare, asked, strict=True)]
        with _writer(model, cache_dir) as writer:
            answers = {name: writer.write(prompts, progress, name) for name, prompts in _arms(bare, shown)}
    _add(report, asked, answers)


def halves(folder: Path) -> tuple[list[Task], list[Task]]:
    """Tasks to learn from and tasks to measure, in an order that is always the same."""
    with gzip.open(folder / "all.nl.gz", "rt") as english, gzip.open(folder / "all.cm.gz", "rt") as commands:
        rows = [(nl.strip(), cm.strip()) for nl, cm in zip(english, commands, strict=True)]
    components = Components()
    for nl, cm in rows:
        components.join(("english", normalised(nl)), ("command", plain(cm)))
    commands_of: dict[str, set[str]] = {}
    english_of: dict[str, str] = {}
    for nl, cm in rows:
        commands_of.setdefault(normalised(nl), set()).add(cm)
        english_of.setdefault(normalised(nl), nl)
    roots = list(dict.fromkeys(str(components.root(("english", key))) for key in english_of))
    Random(5).shuffle(roots)  # noqa: S311 - a reproducible order
    place = {root: index for index, root in enumerate(roots)}
    both: tuple[list[tuple[int, Task]], list[tuple[int, Task]]] = ([], [])
    for key, nl in english_of.items():
        at = place[str(components.root(("english", key)))]
        both[at % 2].append((at, Task(english=nl, commands=tuple(sorted(commands_of[key])))))
    known, asked = (sorted(half, key=lambda pair: pair[0]) for half in both)
    return [task for _, task in known], [task for _, task in asked]


def plain(command: str) -> str:
    """A command with what does not change it made equal: quotes of one kind, single blanks."""
    return " ".join(command.replace('"', "'").split())


def first_command(answer: str) -> str:
    """The first line of an answer that is a command: no fence, prompt sign or label; no comment, no announcement."""
    for line in answer.splitlines():
        found = re.sub(r"^(\$ |Answer:|bash:)\s*", "", line.strip().strip("`").strip())
        if found and found not in {"bash", "sh", "shell"} and not found.startswith("#") and not found.endswith(":"):
            return found
    return ""


def likeness(answer: str, command: str) -> float:
    """F1 of the words of two commands."""
    left, right = plain(answer).split(), plain(command).split()
    common = sum(min(left.count(word), right.count(word)) for word in set(left))
    return 2.0 * common / (len(left) + len(right)) if common else 0.0


@dataclass(slots=True, kw_only=True)
class _Sequence:
    prompt: list[int]
    made: list[int] = field(default_factory=list)
    is_done: bool = False


class _Writer:
    """Greedy answers of a served model, `SEQUENCES` at a time."""

    def __init__(self, tokenizer: Tokenizer, runner: TorchRunner) -> None:
        self._tokenizer, self._runner = tokenizer, runner
        self._next = 0

    def write(self, prompts: Sequence[str], progress: Progress, name: str) -> list[str]:
        """Return the first command of each answer."""
        task = progress.add_task(f"nl2bash: {name}", total=len(prompts))
        answers: list[str] = []
        for start in range(0, len(prompts), SEQUENCES):
            batch = prompts[start : start + SEQUENCES]
            answers += self._batch(batch)
            progress.advance(task, len(batch))
        return answers

    def _batch(self, prompts: Sequence[str]) -> list[str]:
        room = BLOCKS_EACH * BLOCK - ANSWER_TOKENS
        turns = [[{"role": "user", "content": prompt}] for prompt in prompts]
        sequences = [
            _Sequence(prompt=self._tokenizer.encode_chat(turn, add_generation_prompt=True)[-room:]) for turn in turns
        ]
        first = self._next
        self._next += len(sequences)
        for _ in range(ANSWER_TOKENS):
            rows = tuple(self._row(first + i, i, one) for i, one in enumerate(sequences) if not one.is_done)
            if not rows:
                break
            for sampled in self._runner.step(StepPlan(rows=rows)).sampled:
                self._take(sequences[sampled.seq - first], sampled.draws[0].token)
        return [first_command(self._tokenizer.decode(one.made)) for one in sequences]

    def _row(self, seq: int, place: int, one: _Sequence) -> ModelRow:
        tokens = one.made[-1:] or one.prompt
        start = len(one.prompt) + len(one.made) - 1 if one.made else 0
        blocks = tuple(range(place * BLOCKS_EACH, (place + 1) * BLOCKS_EACH))
        return ModelRow(
            seq=seq,
            tokens=tuple(tokens),
            start=start,
            blocks=blocks[: -(-(start + len(tokens)) // BLOCK)],
            sample=SampleSpec(),
        )

    def _take(self, one: _Sequence, token: int) -> None:
        if token in self._tokenizer.eos_ids:
            one.is_done = True
            return
        one.made.append(token)
        text = self._tokenizer.decode(one.made)
        one.is_done = "\n" in text and bool(first_command(text.rsplit("\n", 1)[0]))


@contextmanager
def _writer(model: str, cache_dir: Path) -> Iterator[_Writer]:
    runner = open_runner(
        model, cache_dir=cache_dir, n_blocks=SEQUENCES * BLOCKS_EACH, block_size=BLOCK, precision="int8"
    )
    try:
        yield _Writer(open_tokenizer(model), runner)
    finally:
        runner.close()


async def _filled(known: Sequence[Task], vectors: VectorFile) -> ExamplePool:
    pool = ExamplePool(entries_max=len(known), size_bytes_max=1 << 30, rng=Random(6))  # noqa: S311 - reproducible
    now = MonotonicClock().now()
    for i, task in enumerate(known):
        vector = vectors.vector(task.english)
        if vector is not None:
            pool.add(
                str(i),
                REQUEST.format(english=task.english),
                task.commands[0],
                owner=OWNER,
                model="labels",
                category="code",
                vector=vector,
                now=now,
            )
    await pool.cluster(anyio.CapacityLimiter(1))
    return pool


def _shown(pool: ExamplePool, text: str, task: Task, vectors: VectorFile) -> str:
    vector = vectors.vector(task.english)
    if vector is None:
        return text
    found = pool.find(text, vector, category="code", count=EXAMPLES, tokens_max=EXAMPLE_TOKENS)
    useful = [
        UsefulExample(
            id=e.entry, text=e.text, answer=e.answer, similarity=e.similarity, utility=e.utility, vector=vector
        )
        for e in found
    ]
    return with_examples(text, useful)


def _arms(bare: Sequence[str], shown: Sequence[str]) -> tuple[tuple[str, Sequence[str]], ...]:
    return (("without examples", bare), ("with examples", shown))


def _add(report: Report, asked: Sequence[Task], answers: dict[str, list[str]]) -> None:
    scores: dict[str, dict[str, NDArray[np.float64]]] = {}
    for name, written in answers.items():
        pairs = list(zip(written, asked, strict=True))
        right = [float(any(plain(answer) == plain(one) for one in task.commands)) for answer, task in pairs]
        near = [max(likeness(answer, one) for one in task.commands) for answer, task in pairs]
        scores[name] = {"right": np.array(right), "word_f1": np.array(near)}
    without, with_them = scores["without examples"], scores["with examples"]
    for metric in ("right", "word_f1"):
        gain = with_them[metric] - without[metric]
        for system, samples in (*((name, found[metric]) for name, found in scores.items()), ("difference", gain)):
            low, high = _interval(samples)
            value = float(samples.mean())
            report.rows.append(
                Row(case=CASE, system=system, metric=metric, unit="share", value=value, lo=low, hi=high, n=len(samples))
            )
    if without["word_f1"].any():
        report.ratios["examples/nl2bash/without"] = float(with_them["word_f1"].mean() / without["word_f1"].mean())


def _interval(samples: NDArray[np.float64]) -> tuple[float, float]:
    """The mean's 95 % interval by bootstrap; pairs stay pairs, since a difference is one sample."""
    rng = np.random.default_rng(0)
    means = samples[rng.integers(0, len(samples), (RESAMPLES, len(samples)))].mean(axis=1)
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)
