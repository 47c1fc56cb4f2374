"""The runner's logits are those of transformers, for every family, in prefill, chunks and decode."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from covey.model.runner import open_runner
from covey.model.source import resolve
from covey.model.tokenizer import open_tokenizer
from tests.support.families import FAMILIES, write_reference
from tests.support.reference_model import load_reference
from tests.support.tiny_llama import VOCAB_SIZE

from .driving import generate, log_probabilities, row


@pytest.mark.golden
@pytest.mark.parametrize("kernels", [None, "torch"], ids=["native", "torch"])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_transformers(family: str, kernels: str | None, tmp_path: Path) -> None:
    folder = tmp_path / family
    model = write_reference(FAMILIES[family], folder)
    tokens = torch.randint(0, VOCAB_SIZE, (90,), generator=torch.Generator().manual_seed(1)).tolist()
    with torch.inference_mode():
        expected = torch.log_softmax(model(torch.tensor([tokens])).logits[0].double(), dim=-1).numpy()
    runner = open_runner(str(folder), cache_dir=tmp_path / "cache", n_blocks=20, block_size=8, kernels=kernels)
    assert (runner.kernels == "torch") == (kernels == "torch")
    table = [3, 17, 0, 5, 11, 2, 19, 8, 1, 14, 13, 6]
    steps = [(0, 30), (30, 31), (31, 70), *((i, i + 1) for i in range(70, 90))]
    for start, end in steps:
        found = log_probabilities(runner, [row(1, tokens[start:end], start, table)])[1]
        np.testing.assert_allclose(found, expected[end - 1], atol=2e-4, rtol=0)


def test_a_sliding_window_bounds_the_context(tmp_path: Path) -> None:
    write_reference(FAMILIES["mistral-window"], tmp_path / "windowed")
    runner = open_runner(str(tmp_path / "windowed"), cache_dir=tmp_path / "cache", n_blocks=20, block_size=8)
    assert runner.info.context_limit == 96


@pytest.mark.golden
@pytest.mark.timeout(400)
def test_the_packaged_model_is_greedy_like_transformers(smollm2: Any) -> None:
    """Promise 9 by teacher forcing: our token is the reference's best, or within 1e-3 of it in logit."""
    reference = load_reference(resolve("smollm2").path)
    tokenizer = open_tokenizer("smollm2")
    for prompt in ("What is the capital of France?", "Count from 1 to 12 in words."):
        asked = tokenizer.encode_chat([{"role": "user", "content": prompt}])
        answer = generate(smollm2, asked, 24, list(range(30, 40)), chunk=32)
        with torch.inference_mode():
            logits = reference(torch.tensor([asked + answer])).logits[0, len(asked) - 1 : -1]
        chosen = logits.gather(1, torch.tensor(answer)[:, None])[:, 0]
        assert (logits.max(dim=1).values - chosen).max() <= 1e-3
