"""`covey bench precision`: what each precision of weights, and of keys and values, costs in quality and in memory."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console

from benchmarks.limit import BYTES_PER_WEIGHT, decode_weights
from benchmarks.prompts import OWN
from benchmarks.report import Report
from covey.errors import InvalidArgument
from covey.model.matrix import Precision
from covey.model.pool import KvDtype
from covey.model.runner import open_runner
from covey.model.source import resolve
from covey.model.tokenizer import open_tokenizer
from covey.model.weights import prepare

WINDOW_TOKENS = 1024
TOKENS, QUICK_TOKENS = 8192, 2048
BLOCK_TOKENS = 32
SETTINGS: tuple[tuple[Precision, KvDtype], ...] = (
    ("fp32", "fp32"), ("bf16", "fp32"), ("int8", "fp32"), ("fp32", "fp16"), ("fp32", "int8"), ("int8", "int8"),
)  # fmt: skip
"""Weights, and keys and values; the first is what the others are compared with."""


class Scorer(Protocol):
    """What is asked of a runner."""

    def score(self, tokens: Sequence[int]) -> NDArray[np.float64]:
        """The log probability of each token after the first, given those before it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Quality:
    """Mean negative log likelihood of each window, in nats a token, and what the setting takes: the weights' file, how
    much of it a decoding step reads, and a token's keys and values.
    """

    losses: tuple[float, ...]
    weight_bytes: int
    read_bytes_per_step: int
    kv_bytes_per_token: float

    @property
    def perplexity(self) -> float:
        """Over the whole text."""
        return math.exp(sum(self.losses) / len(self.losses))


def run(model: str, cache_dir: Path, console: Console, *, quick: bool, data: Path | None) -> Report:
    """Score the same text under every setting.

    Raises:
        CoveyError: the model cannot be loaded.
    """
    source, report = resolve(model), Report("precision")
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    text = open_tokenizer(source).encode(fixed_text(data))
    windows = list(windows_of(text, QUICK_TOKENS if quick else TOKENS))
    found: dict[str, Quality] = {}
    for weights, kv in SETTINGS:
        with console.status(f"weights {weights}, keys and values {kv}: {len(windows)} windows"):
            found[f"{weights}-kv-{kv}"] = measure(model, cache_dir, weights, kv, windows)
    add_rows(report, found)
    return report


def measure(model: str, cache_dir: Path, weights: Precision, kv: KvDtype, windows: Sequence[Sequence[int]]) -> Quality:
    """Score all windows under one setting."""
    source = resolve(model)
    runner = open_runner(
        source,
        cache_dir=cache_dir,
        n_blocks=WINDOW_TOKENS // BLOCK_TOKENS,
        block_size=BLOCK_TOKENS,
        precision=weights,
        kv_dtype=kv,
    )
    try:
        return Quality(
            losses=tuple(losses(runner, windows)),
            read_bytes_per_step=decode_weights(source.config()) * BYTES_PER_WEIGHT[weights],
            weight_bytes=prepare(source, source.config(), cache_dir, weights).path.stat().st_size,
            kv_bytes_per_token=runner.info.block_bytes / BLOCK_TOKENS,
        )
    finally:
        runner.close()


def losses(runner: Scorer, windows: Sequence[Sequence[int]]) -> Iterator[float]:
    """Mean negative log likelihood of each window."""
    for window in windows:
        yield -float(np.mean(runner.score(window), dtype=np.float64))


def windows_of(text: Sequence[int], tokens: int) -> Iterator[list[int]]:
    """Windows of equal length: their losses weigh alike. Raises InvalidArgument when the text is too short for one."""
    if len(text) < WINDOW_TOKENS:
        raise InvalidArgument(f"the text has {len(text)} tokens, a window takes {WINDOW_TOKENS}", field="data")
    for start in range(0, min(tokens, len(text)) - WINDOW_TOKENS + 1, WINDOW_TOKENS):
        yield list(text[start : start + WINDOW_TOKENS])


def fixed_text(data: Path | None) -> str:
    """Solved problems of GSM8K where the data folder has them; otherwise the project's licence and its own prompts."""
    file = data / "gsm8k" / "test.jsonl" if data else None
    if file is not None and file.exists():
        rows = [json.loads(line) for line in file.read_text().splitlines() if line.strip()]
        return "\n\n".join(f"{row['question']}\n{row['answer']}" for row in rows[:100])
    licence = Path(__file__).resolve().parent.parent / "LICENSE"
    return "\n\n".join([licence.read_text() if licence.exists() else "", *OWN])


def add_rows(report: Report, found: dict[str, Quality]) -> None:
    """Add each setting's perplexity, its change against the first, and its memory."""
    reference = next(iter(found.values()))
    for name, quality in found.items():
        # Window by window: the text's own ups and downs, which are the same in every setting, cancel out.
        pairs = zip(quality.losses, reference.losses, strict=True)
        changes = [100.0 * math.expm1(mine - theirs) for mine, theirs in pairs]
        kv_bytes = quality.kv_bytes_per_token
        for metric, unit, samples in (
            ("perplexity", "", [quality.perplexity]),
            ("perplexity_change", "%", changes),
            ("weights", "MiB", [quality.weight_bytes / 2**20]),
            ("weights_read_per_step", "MiB", [quality.read_bytes_per_step / 2**20]),
            ("kv_bytes_per_token", "bytes", [kv_bytes]),
        ):
            report.add(case=name, system="covey", metric=metric, unit=unit, samples=samples)
