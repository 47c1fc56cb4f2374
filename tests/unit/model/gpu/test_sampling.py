"""The sampling kernel against its sorting reference and against the CPU's sampler."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from covey.model.gpu.kernels import sampling
from covey.model.gpu.kernels.sampling import NOT_FINITE, DrawSettings, draw_tokens, draw_tokens_reference
from covey.model.plan import SampleSpec
from covey.model.sampler import draw, uniform

from .pools import source

VOCAB = 259


def settings_of(specs: list[SampleSpec], allowed: list[list[int] | None] | None = None) -> DrawSettings:
    """Rows of settings; `allowed` are the tokens of each row's mask, None for no mask."""
    allowed = allowed or [None] * len(specs)
    masks = np.zeros((len(specs), -(-VOCAB // 32)), dtype=np.uint32)
    for row, tokens in enumerate(allowed):
        for token in tokens or []:
            masks[row, token // 32] |= np.uint32(1 << (token % 32))
    rows = [-1 if tokens is None else row for row, tokens in enumerate(allowed)]

    def column(name: str, dtype: torch.dtype) -> torch.Tensor:
        return torch.tensor([getattr(spec, name) for spec in specs], dtype=dtype)

    return DrawSettings(
        temperature=column("temperature", torch.float32),
        top_k=column("top_k", torch.int32),
        top_p=column("top_p", torch.float32),
        min_p=column("min_p", torch.float32),
        uniform=torch.tensor([uniform(s.seed, s.position) for s in specs], dtype=torch.float32),
        mask_row=torch.tensor(rows, dtype=torch.int32),
        masks=torch.from_numpy(masks.view(np.int32)),
    )


SPECS = [
    SampleSpec(),
    SampleSpec(temperature=1.0, seed=1),
    SampleSpec(temperature=0.7, top_k=5, seed=2),
    SampleSpec(temperature=1.5, top_p=0.8, seed=3),
    SampleSpec(temperature=1.0, min_p=0.2, seed=4),
    SampleSpec(temperature=2.0, top_k=40, top_p=0.9, min_p=0.02, seed=5),
    SampleSpec(temperature=1.0, top_p=0.0, seed=6),
]


@pytest.mark.parametrize("block", [64, 4096])
def test_draws_equal_the_reference_and_the_cpu_sampler(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling, "_BLOCK", block)
    specs = SPECS[:5] if block == 64 else SPECS
    logits = torch.randn(len(specs), VOCAB, generator=source(1)) * 3
    found = draw_tokens(logits, settings_of(specs)).tolist()
    assert found == draw_tokens_reference(logits, settings_of(specs)).tolist()
    assert found == [draw(row, spec).token for row, spec in zip(logits.numpy(), specs, strict=True)]


def test_masks_keep_every_other_token_out() -> None:
    specs = [*SPECS[:4], SampleSpec(temperature=1.0, seed=9)]
    logits = torch.randn(5, VOCAB, generator=source(2))
    logits[:, 7] = 50.0
    allowed: list[list[int] | None] = [[3, 40, 258], [31, 32, 64], [100], None, []]
    asked = settings_of(specs, allowed)
    found = draw_tokens(logits, asked).tolist()
    assert found == draw_tokens_reference(logits, asked).tolist()
    assert found[0] in {3, 40, 258}
    assert found[1] in {31, 32, 64}
    assert found[2:] == [100, 7, NOT_FINITE]


def test_rows_that_are_not_finite_fail_alone() -> None:
    logits = torch.randn(4, VOCAB, generator=source(3))
    logits[1, 250], logits[2, 0] = torch.nan, torch.inf
    specs = [SampleSpec(), SampleSpec(temperature=1.0), SampleSpec(), SampleSpec(temperature=0.5, seed=1)]
    found = draw_tokens(logits, settings_of(specs)).tolist()
    assert found == draw_tokens_reference(logits, settings_of(specs)).tolist()
    assert found[1:3] == [NOT_FINITE, NOT_FINITE]
    assert min(found[0], found[3]) >= 0


def test_of_equal_logits_the_first_is_greedy_and_ties_at_a_threshold_stay() -> None:
    logits = torch.zeros(3, VOCAB)
    logits[:, [20, 200]] = 4.0
    specs = [SampleSpec(), *(SampleSpec(temperature=1.0, top_k=1, seed=seed) for seed in (0, 5))]
    found = draw_tokens(logits, settings_of(specs)).tolist()
    assert found == draw_tokens_reference(logits, settings_of(specs)).tolist()
    assert found[0] == 20
    assert set(found[1:]) <= {20, 200}


@settings(max_examples=12, derandomize=True)
@given(
    st.floats(0.25, 4.0),
    st.integers(0, 30),
    st.sampled_from((1.0, 0.95, 0.5)),
    st.sampled_from((0.0, 0.1)),
    st.integers(0, 2**31),
)
def test_any_settings(temperature: float, top_k: int, top_p: float, min_p: float, seed: int) -> None:
    spec = SampleSpec(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, seed=seed)
    logits = torch.randn(1, VOCAB, generator=source(seed % 1000)) * 2
    asked = settings_of([spec])
    assert draw_tokens(logits, asked).tolist() == draw_tokens_reference(logits, asked).tolist()
