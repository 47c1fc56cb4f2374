"""The roofline: arithmetic of a known shape, and a measurement that is a speed."""

from __future__ import annotations

import pytest

from benchmarks.limit import Limits, decode_weights, measure
from covey.clock import MonotonicClock
from covey.model.source import resolve


def test_the_packaged_model_reads_each_weight_once_a_token() -> None:
    config = resolve("smollm2").config()
    weights = decode_weights(config)
    # 134.5 million parameters, of which only the 61 norms are no matrices; the head is the table of embeddings.
    assert weights == 134_515_008 - 61 * 576
    reading = Limits(read_bytes_per_s=25e9, operations_per_s={"fp32": 1e15})
    assert reading.decode_tokens_per_s(config) == pytest.approx(25e9 / (4 * weights))
    computing = Limits(read_bytes_per_s=1e15, operations_per_s={"fp32": 100e9})
    assert computing.decode_tokens_per_s(config) == pytest.approx(100e9 / (2 * weights))


def test_the_machine_is_measured() -> None:
    found = measure(MonotonicClock())
    assert 1e8 < found.read_bytes_per_s < 1e13
    assert 1e8 < found.operations_per_s < 1e15
