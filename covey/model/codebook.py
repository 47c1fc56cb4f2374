"""Codebooks of a model, trained on its own keys and values of a text."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from covey.compression.codebook import Codebook, train
from covey.compression.pages import Pages, read_pages

from .runner import TorchRunner, open_runner
from .source import resolve
from .tokenizer import open_tokenizer

WINDOW_TOKENS = 1024
"""The text runs in pieces of this length, as the keys of short and long contexts differ."""
BLOCK_TOKENS = 32
ROUNDS = 8


def train_codebook(
    model: str,
    text: str,
    cache_dir: Path,
    *,
    tokens: int,
    seed: int = 0,
    done: Callable[[int, int], None] | None = None,
) -> Codebook:
    """Run the first `tokens` tokens of a text and train each layer's codebook; `done` hears of each layer.

    Raises:
        InvalidArgument: no such model, or too short a text.
    """
    source = resolve(model)
    ids = open_tokenizer(source).encode(text)[:tokens]
    n_blocks = WINDOW_TOKENS // BLOCK_TOKENS
    runner = open_runner(source, cache_dir=cache_dir, n_blocks=n_blocks, block_size=BLOCK_TOKENS)
    try:
        blocks = list(blocks_of(runner, ids))
    finally:
        runner.close()
    rng = np.random.default_rng(seed)
    return train(blocks, model=source.name, revision=source.revision, rounds=ROUNDS, rng=rng, done=done)


def blocks_of(runner: TorchRunner, tokens: Sequence[int]) -> Iterator[Pages]:
    """The full blocks of a text, window by window; overwrites the pool."""
    shape = runner.info.shape
    for start in range(0, len(tokens), WINDOW_TOKENS):
        window = tokens[start : start + WINDOW_TOKENS]
        if len(window) < 2 * shape.tokens:
            return
        runner.score(window)
        for block in range((len(window) - 1) // shape.tokens):
            with runner.block_view(block) as view:
                yield read_pages(view, shape)
