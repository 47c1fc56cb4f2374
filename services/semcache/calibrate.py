"""Learns decisions from labelled questions: `python -m services.semcache.calibrate QUESTIONS DECISIONS`.

Each line of QUESTIONS is `{"category", "text", "answer"}` and, in a dialogue, `"turns"`: the user's turns before. Equal
answers of one category mean that either question's answer serves the other. Questions are taken in their order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from hashlib import blake2b
from pathlib import Path

import click
import msgspec

from covey.errors import CoveyError
from covey.policy.dialogue import spell_out
from covey.policy.reuse_learning import Labelled, LearningConfig, Learnt, learn_decision

from .learnt import LearntFile, to_learnt, write_learnt
from .minilm import PACKAGED, Encoded, SentenceModel, find_model

CHUNK = 256
Encode = Callable[[Sequence[str]], list[Encoded]]


class LabelledLine(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One question of the file."""

    category: str
    text: str
    answer: str
    turns: tuple[str, ...] = ()


def calibrate(lines: Iterable[LabelledLine], encode: Encode, config: LearningConfig) -> dict[str, Learnt]:
    """Learn every category that has lines."""
    by_category: dict[str, list[LabelledLine]] = {}
    for line in lines:
        by_category.setdefault(line.category, []).append(line)
    return {name: learn_decision(_labelled(found, encode), config) for name, found in by_category.items()}


def _labelled(lines: Sequence[LabelledLine], encode: Encode) -> list[Labelled]:
    spelt = [spell_out(line.text, line.turns) for line in lines]
    encoded: list[Encoded] = []
    for start in range(0, len(spelt), CHUNK):
        encoded += encode([one.text for one in spelt[start : start + CHUNK]])
    answers: dict[str, int] = {}
    return [
        Labelled(
            text=one.text,
            answer=answers.setdefault(line.answer, len(answers)),
            vector=vector.vector,
            shelf=0 if one.resolved else _shelf(line.turns),
        )
        for line, one, vector in zip(lines, spelt, encoded, strict=True)
    ]


def _shelf(turns: Sequence[str]) -> int:
    return int.from_bytes(blake2b(msgspec.json.encode(turns), digest_size=7).digest())


@click.command()
@click.argument("questions", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.argument("decisions", type=click.Path(dir_okay=False, path_type=Path))
@click.option("--encoder", default=PACKAGED, show_default=True, help="As semcache.encoder.")
@click.option("--budget", default=0.01, show_default=True, help="Share of the look-ups that may be false hits.")
def main(questions: Path, decisions: Path, encoder: str, budget: float) -> None:
    """Learn decisions from labelled QUESTIONS (JSON lines) and write them to DECISIONS."""
    try:
        folder = find_model(encoder)
        lines = [msgspec.json.decode(line, type=LabelledLine) for line in questions.read_bytes().splitlines() if line]
    except (CoveyError, msgspec.DecodeError) as error:
        raise click.ClickException(str(error)) from error
    model = SentenceModel(folder, threads=1, batch_max=32)
    found = calibrate(lines, model.encode, LearningConfig(budget=budget))
    learnt = {}
    for name, one in found.items():
        right, false = 100.0 * one.right / one.asked, 100.0 * one.false / one.asked
        if one.model is None:
            click.echo(f"{name}: {one.asked} questions, nothing to be had within the budget")
            continue
        learnt[name] = to_learnt(one.model, right=right, false=false)
        click.echo(f"{name}: {one.asked} questions, {right:.2f} right and {false:.2f} false hits per 100")
    write_learnt(decisions, LearntFile(encoder=encoder, categories=learnt))


if __name__ == "__main__":
    main()
