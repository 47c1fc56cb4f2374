"""The folder written for a peer holds the same model: weights, shape, tokens, chat template."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from benchmarks.export import config_json, export, tensors
from covey.errors import Unavailable
from covey.model.config import RopeScaling, from_hf
from covey.model.source import ModelSource, resolve
from covey.model.tokenizer import open_tokenizer
from covey.model.weights import map_weights, prepare
from tests.support.tiny_llama import write_tiny_llama

TEXT = "Numbers 1234, accents \u00e9\u00fc, code: for i in range(10):\n\tprint(i)"


@pytest.fixture(scope="module")
def packaged(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, ModelSource]]:
    cache = tmp_path_factory.mktemp("cache")
    yield cache, resolve(str(export(resolve("smollm2"), cache)))
    for path in cache.rglob("*"):
        if path.is_file():
            path.unlink()


def test_the_packaged_model_comes_back_bit_for_bit(packaged: tuple[Path, ModelSource]) -> None:
    cache, exported = packaged
    original = resolve("smollm2")
    shape = original.config()
    assert exported.config() == shape
    ours = map_weights(prepare(original, shape, cache).path, shape)
    back = map_weights(prepare(exported, shape, cache).path, shape)
    assert torch.equal(ours.embed, back.embed)
    for mine, theirs in zip(ours.layers, back.layers, strict=True):
        assert torch.equal(mine.attn_norm, theirs.attn_norm)
        assert torch.equal(mine.mlp_norm, theirs.mlp_norm)
        for part in ("qkv", "o", "gate_up", "down"):
            assert torch.equal(getattr(mine, part).data, getattr(theirs, part).data), part


def test_the_packaged_tokenizer_and_template_come_back(packaged: tuple[Path, ModelSource]) -> None:
    ours, theirs = open_tokenizer("smollm2"), open_tokenizer(packaged[1])
    messages = [{"role": "user", "content": TEXT}]
    assert theirs.encode_chat(messages) == ours.encode_chat(messages)
    assert theirs.eos_ids == ours.eos_ids


def test_a_second_export_writes_nothing(packaged: tuple[Path, ModelSource]) -> None:
    cache, exported = packaged
    before = (exported.path / "model.safetensors").stat().st_mtime_ns
    assert export(resolve("smollm2"), cache) == exported.path
    assert (exported.path / "model.safetensors").stat().st_mtime_ns == before


def test_a_folder_is_served_as_it_is(tmp_path: Path) -> None:
    folder = write_tiny_llama(tmp_path / "tiny")
    assert export(resolve(str(folder)), tmp_path / "cache") == folder
    assert not (tmp_path / "cache").exists()


def test_rotary_halves_are_the_checkpoint_they_came_from(tmp_path: Path) -> None:
    folder = write_tiny_llama(tmp_path / "tiny")
    source = resolve(str(folder))
    config = source.config()
    found = tensors(map_weights(prepare(source, config, tmp_path / "cache").path, config), config)
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        assert set(found) == set(file.keys())
        for name in file.keys():  # noqa: SIM118 - not a mapping
            assert torch.equal(found[name], file.get_tensor(name)), name


def test_a_stretched_rotary_embedding_keeps_all_its_numbers() -> None:
    scaling = RopeScaling(kind="llama3", factor=8.0, low_freq_factor=2.0, high_freq_factor=5.0, original_context=1024)
    config = replace(resolve("smollm2").config(), rope_scaling=scaling, eos_ids=(2, 5))
    assert from_hf(config_json(config), {}) == config


def test_a_folder_that_cannot_be_written_is_a_clear_error(
    packaged: tuple[Path, ModelSource], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    cache, exported = packaged
    aside = exported.path.rename(cache / "aside")
    try:
        monkeypatch.setattr("benchmarks.export.save_file", full)
        with pytest.raises(Unavailable, match=r"cannot write .*No space left"):
            export(resolve("smollm2"), cache)
        assert not exported.path.exists()
    finally:
        aside.rename(exported.path)
