"""The packaged model reads on over a context that passed through a codec nearly as over the exact one."""

from __future__ import annotations

import numpy as np
import pytest

from covey.compression import Codec, Fp16, Int8, decode, encode
from covey.model.runner import TorchRunner
from covey.model.source import resolve
from covey.model.tokenizer import open_tokenizer

TEXT = (
    "Natalia sold clips to forty-eight of her friends in April, and then she sold half as many clips in May. "
    "How many clips did Natalia sell altogether in April and May? In May she sold half of forty-eight, which is "
    "twenty-four clips. Together that makes forty-eight and twenty-four, which is seventy-two clips. "
)


@pytest.mark.parametrize(("codec", "most"), [(Fp16(), 0.001), (Int8(), 0.01)])
def test_a_context_through_a_codec_changes_little(smollm2: TorchRunner, codec: Codec, most: float) -> None:
    shape = smollm2.info.shape
    tokens = open_tokenizer(resolve("smollm2")).encode(TEXT * 3)[: 6 * shape.tokens]
    known = 4 * shape.tokens
    smollm2.score(tokens[:known])
    exact = smollm2.score(tokens, known=known)
    for block in range(4):
        with smollm2.block_view(block) as view:
            decode(codec, encode(codec, view, shape), shape, view)
    after = smollm2.score(tokens, known=known)
    assert len(after) == len(tokens) - 1 - known
    assert 0 < np.abs(after - exact).mean() < most
    assert after.mean() == pytest.approx(exact.mean(), abs=most)
