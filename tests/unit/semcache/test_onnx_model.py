"""The encoder through ONNX Runtime: what is refused without it, and the torch model's vectors where it is."""

from __future__ import annotations

from pathlib import Path

import pytest

from covey.errors import InvalidArgument, Unavailable
from services.semcache import onnx_model
from services.semcache.minilm import PACKAGED, find_model
from services.semcache.onnx_model import OnnxModel, file_fingerprint


def test_without_the_runtime_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(onnx_model, "find_spec", lambda _: None)
    with pytest.raises(Unavailable, match="onnxruntime is not installed"):
        OnnxModel(tmp_path / "m.onnx", tmp_path, threads=1, batch_max=8)


def test_a_missing_file_and_another_pooling_are_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(onnx_model, "find_spec", lambda _: object())
    with pytest.raises(InvalidArgument, match="no file"):
        OnnxModel(tmp_path / "m.onnx", find_model(PACKAGED), threads=1, batch_max=8)
    (tmp_path / "m.onnx").write_bytes(b"x")
    (tmp_path / "1_Pooling").mkdir()
    (tmp_path / "1_Pooling" / "config.json").write_text('{"pooling_mode_cls_token": true}')
    with pytest.raises(InvalidArgument, match="pool by the mean"):
        OnnxModel(tmp_path / "m.onnx", tmp_path, threads=1, batch_max=8)


def test_another_file_has_another_fingerprint(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"a")
    (tmp_path / "b").write_bytes(b"b")
    assert file_fingerprint(tmp_path / "a") != file_fingerprint(tmp_path / "b")
    with pytest.raises(InvalidArgument):
        file_fingerprint(tmp_path / "c")
