"""The folder written for a peer holds the same model: weights, shape, tokens, chat template."""

from __future__ import annotations

import errno
import struct
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from benchmarks.export import config_json, export, tensors
from covey.errors import Unavailable
from covey.model.checkpoint import Checkpoint
from covey.model.config import RopeScaling, from_hf
from covey.model.source import ModelSource, resolve
from covey.model.tokenizer import open_tokenizer
from tests.support.tiny_llama import write_tiny_llama

TEXT = "Numbers 1234, accents \u00e9\u00fc, code: for i in range(10):\n\tprint(i)"


LAYERS = 2

# One worker makes the folder for all of these tests.
pytestmark = pytest.mark.xdist_group("bench-export")


@pytest.fixture(scope="module")
def packaged(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[ModelSource, ModelSource]]:
    """The packaged model's first layers, its tokenizer and its template; and the folder that was exported from it."""
    cache = tmp_path_factory.mktemp("cache")
    original = first_layers(resolve("smollm2").path, cache / "cut.gguf")
    yield original, resolve(str(export(original, cache)))
    for path in cache.rglob("*"):
        if path.is_file():
            path.unlink()


def first_layers(path: Path, target: Path) -> ModelSource:
    """The same file, which says that it has fewer layers: the other tensors are never looked at."""
    key, uint32 = b"llama.block_count", 4
    count = [key + struct.pack("<II", uint32, layers) for layers in (resolve("smollm2").config().n_layers, LAYERS)]
    whole = path.read_bytes()
    assert count[0] in whole
    target.write_bytes(whole.replace(count[0], count[1], 1))
    return resolve(str(target))


def test_the_packaged_model_comes_back_bit_for_bit(packaged: tuple[ModelSource, ModelSource]) -> None:
    original, exported = packaged
    shape = original.config()
    assert exported.config() == shape
    assert shape.n_layers == LAYERS
    ours, back = (Checkpoint(source, shape) for source in packaged)
    parts = ("attn_norm", "q", "k", "v", "o", "mlp_norm", "gate", "up", "down")
    for name in ("embed", "final_norm", *(f"{layer}.{part}" for layer in range(LAYERS) for part in parts)):
        assert torch.equal(ours.read(name), back.read(name)), name


def test_the_packaged_tokenizer_and_template_come_back(packaged: tuple[ModelSource, ModelSource]) -> None:
    ours, theirs = open_tokenizer("smollm2"), open_tokenizer(packaged[1])
    messages = [{"role": "user", "content": TEXT}]
    assert theirs.encode_chat(messages) == ours.encode_chat(messages)
    assert theirs.eos_ids == ours.eos_ids


def test_a_second_export_writes_nothing(packaged: tuple[ModelSource, ModelSource]) -> None:
    original, exported = packaged
    before = (exported.path / "model.safetensors").stat().st_mtime_ns
    assert export(original, original.path.parent) == exported.path
    assert (exported.path / "model.safetensors").stat().st_mtime_ns == before


def test_a_folder_is_served_as_it_is(tmp_path: Path) -> None:
    folder = write_tiny_llama(tmp_path / "tiny")
    assert export(resolve(str(folder)), tmp_path / "cache") == folder
    assert not (tmp_path / "cache").exists()


def test_rotary_halves_are_the_checkpoint_they_came_from(tmp_path: Path) -> None:
    folder = write_tiny_llama(tmp_path / "tiny")
    source = resolve(str(folder))
    config = source.config()
    found = tensors(Checkpoint(source, config), config)
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        assert set(found) == set(file.keys())
        for name in file.keys():  # noqa: SIM118 - not a mapping
            assert torch.equal(found[name], file.get_tensor(name)), name


def test_a_stretched_rotary_embedding_keeps_all_its_numbers() -> None:
    scaling = RopeScaling(kind="llama3", factor=8.0, low_freq_factor=2.0, high_freq_factor=5.0, original_context=1024)
    config = replace(resolve("smollm2").config(), rope_scaling=scaling, eos_ids=(2, 5))
    assert from_hf(config_json(config), {}) == config


def test_a_folder_that_cannot_be_written_is_a_clear_error(
    packaged: tuple[ModelSource, ModelSource], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("benchmarks.export.save_file", full)
    with pytest.raises(Unavailable, match=r"cannot write .*No space left"):
        export(packaged[0], tmp_path)
    assert not any(path.suffix != ".partial" for path in tmp_path.iterdir())
