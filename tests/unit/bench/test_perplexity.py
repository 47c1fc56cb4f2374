"""Perplexity of a known scorer, and what changes against the first setting."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from benchmarks.perplexity import WINDOW_TOKENS, Quality, add_rows, fixed_text, losses, windows_of
from benchmarks.report import Report
from covey.errors import InvalidArgument


class Uniform:
    """Finds every token of a hundred as likely."""

    def score(self, tokens: Sequence[int]) -> NDArray[np.float64]:
        return np.full(len(tokens) - 1, -math.log(100.0))


def test_a_model_that_knows_nothing_is_as_perplexed_as_its_vocabulary() -> None:
    found = tuple(losses(Uniform(), [[1, 2, 3], [4, 5, 6]]))
    quality = Quality(losses=found, weight_bytes=1, read_bytes_per_step=1, kv_bytes_per_token=1.0)
    assert quality.perplexity == pytest.approx(100.0)


def test_windows_are_of_equal_length_and_never_more_than_asked_for() -> None:
    text = list(range(5 * WINDOW_TOKENS + 7))
    found = list(windows_of(text, 3 * WINDOW_TOKENS))
    assert [window[0] for window in found] == [0, WINDOW_TOKENS, 2 * WINDOW_TOKENS]
    assert {len(window) for window in found} == {WINDOW_TOKENS}
    with pytest.raises(InvalidArgument, match="window"):
        list(windows_of(text[:10], 3 * WINDOW_TOKENS))


def test_the_change_is_against_the_first_setting() -> None:
    report = Report("precision")
    first = Quality(losses=(2.0, 3.0), weight_bytes=4 << 20, read_bytes_per_step=1, kv_bytes_per_token=400.0)
    second = Quality(losses=(2.01, 3.01), weight_bytes=1 << 20, read_bytes_per_step=1, kv_bytes_per_token=100.0)
    add_rows(report, {"fp32-kv-fp32": first, "int8-kv-int8": second})
    found = {(row.case, row.metric): row.value for row in report.rows}
    assert found["fp32-kv-fp32", "perplexity_change"] == 0.0
    assert found["int8-kv-int8", "perplexity_change"] == pytest.approx(100 * (math.exp(0.01) - 1))
    assert found["int8-kv-int8", "perplexity"] == pytest.approx(math.exp(2.51))
    assert found["int8-kv-int8", "weights"] == 1.0


def test_the_text_is_there_without_any_data(tmp_path: Path) -> None:
    assert len(fixed_text(None)) > 8000
    (tmp_path / "gsm8k").mkdir()
    (tmp_path / "gsm8k" / "test.jsonl").write_text('{"question": "How many?", "answer": "#### 3"}\n')
    assert fixed_text(tmp_path) == "How many?\n#### 3"
