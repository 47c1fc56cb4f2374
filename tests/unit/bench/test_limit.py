"""The roofline: arithmetic of a known shape, and a measurement that is a speed."""

from __future__ import annotations

import pytest

from benchmarks.limit import Limits, attention_operations, decode_weights, head_weights, measure
from covey.clock import MonotonicClock
from covey.model.source import resolve

CONFIG = resolve("smollm2").config()


def limits(read: float, **operations: float) -> Limits:
    return Limits(read_bytes_per_s=read, operations_per_s=operations)


def test_the_packaged_model_reads_each_weight_once_a_token() -> None:
    weights = decode_weights(CONFIG)
    # 134.5 million parameters, of which only the 61 norms are no matrices; the head is the table of embeddings.
    assert weights == 134_515_008 - 61 * 576
    assert limits(25e9, fp32=1e15).decode_tokens_per_s(CONFIG) == pytest.approx(25e9 / (4 * weights))
    assert limits(1e15, fp32=100e9).decode_tokens_per_s(CONFIG) == pytest.approx(100e9 / (2 * weights))


def test_a_batch_shares_the_weights_but_not_its_context() -> None:
    reading = limits(25e9, fp32=1e15)
    alone = reading.decode_tokens_per_s(CONFIG)
    assert reading.decode_tokens_per_s(CONFIG, batch=8) == pytest.approx(8 * alone)
    read = 4 * decode_weights(CONFIG) + 8 * 100 * 46080
    with_context = reading.decode_tokens_per_s(CONFIG, batch=8, context=100, kv_bytes_per_token=46080)
    assert with_context == pytest.approx(8 * 25e9 / read)


def test_narrow_weights_may_be_widened_and_wide_ones_never_narrowed() -> None:
    found = limits(25e9, fp32=100e9, bf16=50e9, int8=400e9)
    assert [found.product_rate(precision) for precision in ("fp32", "bf16", "int8")] == [100e9, 100e9, 400e9]
    assert found.decode_tokens_per_s(CONFIG, precision="int8") == pytest.approx(25e9 / decode_weights(CONFIG))


def test_a_prompt_multiplies_every_token_but_its_logits_once() -> None:
    layers = decode_weights(CONFIG) - head_weights(CONFIG)
    operations = 2 * (512 * layers + head_weights(CONFIG)) + attention_operations(CONFIG) * 512 * 513 / 2
    assert limits(1e15, fp32=100e9).prefill_tokens_per_s(CONFIG, 512) == pytest.approx(512 * 100e9 / operations)
    assert attention_operations(CONFIG) == 4 * 9 * 64 * 30


def test_the_machine_is_measured() -> None:
    found = measure(MonotonicClock(), read_floats=1 << 22, sizes=(128,))
    assert 1e8 < found.read_bytes_per_s < 1e13
    assert set(found.operations_per_s) == {"fp32", "bf16", "int8"}
    assert all(1e6 < rate < 1e15 for rate in found.operations_per_s.values())
