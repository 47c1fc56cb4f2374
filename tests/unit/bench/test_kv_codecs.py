"""The benchmark of codecs: its arithmetic, and one run over a tiny model."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from rich.console import Console

from benchmarks import kv_codecs
from benchmarks.kv_codecs import BLOCK_TOKENS, Figures, add_rows, run
from benchmarks.report import Report
from covey.types.block import BlockShape, KvElement
from tests.support.tiny_llama import write_tiny_llama
from tests.unit.compression.blocks import codebook_for

TINY = BlockShape(size_bytes=1, layers=2, element=KvElement.FP32, kv_heads=2, head_dim=16, tokens=BLOCK_TOKENS)


def test_the_change_is_against_the_first_codec() -> None:
    report = Report("kv_codecs")
    raw = Figures(losses=[2.0, 3.0])
    half = Figures(losses=[2.01, 3.01], encode_rates=[1e9, 3e9, 2e9], decode_rates=[4e9], block_bytes=512)
    add_rows(report, {"raw": raw, "half": half}, 1024)
    found = {(row.case, row.metric): row.value for row in report.rows}
    assert found["half", "perplexity_change"] == pytest.approx(100 * math.expm1(0.01))
    assert found["half", "perplexity"] == pytest.approx(math.exp(2.51))
    assert (found["half", "compression"], found["raw", "compression"]) == (2.0, 1.0)
    assert found["half", "kv_bytes_per_token"] == 512 / BLOCK_TOKENS
    assert found["half", "encode_bytes_per_s_p50"] == 2e9
    assert ("raw", "encode_bytes_per_s_p50") not in found


def test_a_run_measures_every_codec(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kv_codecs, "QUICK_WINDOWS", 1)
    model = write_tiny_llama(tmp_path / "model")
    report = run(str(model), tmp_path, Console(quiet=True), quick=True, data=None, codebook=codebook_for(TINY))
    found = {(row.case, row.metric): row.value for row in report.rows}
    raw_bytes = 2 * 2 * 2 * 16 * 4
    assert found["raw", "kv_bytes_per_token"] == raw_bytes
    assert found["fp16", "kv_bytes_per_token"] == raw_bytes / 2
    assert found["pq4", "kv_bytes_per_token"] == raw_bytes / 8 + 2 * 8 / BLOCK_TOKENS
    assert abs(found["fp16", "perplexity_change"]) < 1.0
    assert abs(found["int8", "perplexity_change"]) < 10.0
    assert abs(found["pq4", "perplexity_change"]) > 10.0, "a codebook that was never trained"
    cases = {case for case, _ in found}
    assert {"xquant-input-8", "xquant-latent-4", "xquant-cross-layer-4"} <= cases
    assert all(found[case, "decode_bytes_per_s_p50"] > 0 for case in cases - {"raw"})
