"""Requests that a small and a large model both answered, with the quality of both answers, from the public data."""

from __future__ import annotations

import csv
import gzip
import io
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from services.semcache.vectors import Vectors

SMALL, LARGE = "mistralai/Mixtral-8x7B-Instruct-v0.1", "gpt-4-1106-preview"
ANSWER_WORDS = 120
"""So much of an answer is compared: what the encoder can read."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """A request and both answers. Qualities lie in [0, 1]; see `PairSet.quality`."""

    text: str
    small_answer: str
    large_answer: str
    small: float
    large: float


@dataclass(frozen=True, slots=True, kw_only=True)
class PairSet:
    """Pairs of one source; `quality` says what their quality is."""

    name: str
    quality: str
    pairs: tuple[Pair, ...]


def gsm8k(data: Path) -> PairSet:
    """1,319 problems with the correctness of Mixtral-8x7B and GPT-4 (RouteLLM)."""
    with gzip.open(data / "routellm-gsm8k" / "gsm8k_responses.csv.gz", "rt", encoding="utf-8") as file:
        rows = list(csv.DictReader(io.StringIO(file.read())))
    pairs = tuple(
        Pair(
            text=row["prompt"],
            small_answer=row[f"{SMALL}_response"],
            large_answer=row[f"{LARGE}_response"],
            small=float(row[SMALL] == "True"),
            large=float(row[LARGE] == "True"),
        )
        for row in rows
    )
    return PairSet(name="routellm-gsm8k", quality="right or wrong", pairs=pairs)


def texts_to_compare(data: Path, *, count: int | None = None) -> list[str]:
    """Requests and heads of answers whose vectors `alpaca_eval` and `arena_hard` need, of the first `count` of each."""
    sets = (_alpaca(data)[:count], _arena(data)[:count])
    return [text for rows in sets for row in rows for text in (row[0], *map(_head, row[1:]))]


def alpaca_eval(data: Path, vector_of: Callable[[str], Vectors | None], *, count: int | None = None) -> PairSet:
    """805 instructions answered by Phi-2 and GPT-4, or the first `count` of them."""
    return PairSet(name="alpaca-eval", quality=_PROXY, pairs=_compared(_alpaca(data)[:count], vector_of))


def arena_hard(data: Path, vector_of: Callable[[str], Vectors | None], *, count: int | None = None) -> PairSet:
    """500 hard prompts answered by GPT-3.5 and GPT-4, or the first `count` of them."""
    return PairSet(name="arena-hard", quality=_PROXY, pairs=_compared(_arena(data)[:count], vector_of))


_PROXY = "cosine of the answer with the large model's (nobody judged these)"


def _compared(rows: Sequence[tuple[str, str, str]], vector_of: Callable[[str], Vectors | None]) -> tuple[Pair, ...]:
    pairs = []
    for text, small_answer, large_answer in rows:
        small, large = vector_of(_head(small_answer)), vector_of(_head(large_answer))
        if vector_of(text) is None or small is None or large is None:
            continue
        quality = max(0.0, float(small @ large))
        pairs.append(Pair(text=text, small_answer=small_answer, large_answer=large_answer, small=quality, large=1.0))
    return tuple(pairs)


def _alpaca(data: Path) -> list[tuple[str, str, str]]:
    def outputs(name: str) -> dict[str, str]:
        with gzip.open(data / "alpaca-eval" / f"{name}-model_outputs.json.gz", "rt", encoding="utf-8") as file:
            return {row["instruction"]: row["output"] for row in json.load(file)}

    small, large = outputs("phi-2"), outputs("gpt4")
    return [(_head(text), small[text], large[text]) for text in large if text in small]


def _arena(data: Path) -> list[tuple[str, str, str]]:
    def answers(name: str) -> dict[str, str]:
        with gzip.open(data / "arena-hard" / f"{name}.jsonl.gz", "rt", encoding="utf-8") as file:
            rows = map(json.loads, file)
            return {row["question_id"]: row["choices"][0]["turns"][0]["content"] for row in rows}

    small, large = answers("gpt-3.5-turbo-0125"), answers("gpt-4-0314")
    questions = [json.loads(line) for line in (data / "arena-hard" / "question.jsonl").read_text().splitlines()]
    return [
        (_head(row["turns"][0]["content"]), small[row["question_id"]], large[row["question_id"]]) for row in questions
    ]


def _head(text: str) -> str:
    """As much of a text as the encoder can read."""
    return " ".join(text.split()[:ANSWER_WORDS])[:800]
