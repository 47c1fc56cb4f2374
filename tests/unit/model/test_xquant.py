"""XQuant: keys and values from quantised layer inputs are those that the runner would have kept."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from covey.compression.pages import Floats, Pages, read_pages, write_pages
from covey.errors import DataCorrupt, InvalidArgument
from covey.model.codebook import train_codebook
from covey.model.loading import Loaded, load
from covey.model.runner import TorchRunner, open_runner
from covey.model.source import resolve
from covey.model.xquant import Keep, Recorder, Xquant
from tests.support.tiny_llama import write_tiny_llama

TOKENS = tuple(range(5, 45))
BLOCK = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Context:
    runner: TorchRunner
    loaded: Loaded
    blocks: tuple[Pages, ...]
    inputs: Floats


@pytest.fixture(scope="module", params=[2, 4], ids=["grouped", "each-its-own"])
def context(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Context]:
    """A text through a model whose heads share keys and values in pairs, and one in which each has its own."""
    folder = tmp_path_factory.mktemp("xquant")
    source = resolve(str(write_tiny_llama(folder / "model", n_layers=3, n_kv_heads=request.param)))
    loaded = load(source, cache_dir=folder, n_blocks=1, block_size=BLOCK)
    runner = open_runner(source, cache_dir=folder, n_blocks=8, block_size=BLOCK, kv_dtype="fp32")
    recorder = runner.wrap_layers(lambda layers: Recorder(layers, loaded.config))
    runner.score(TOKENS)
    blocks = tuple(read_pages(runner.block_view(i), runner.info.shape) for i in range(len(TOKENS) // BLOCK))
    yield Context(runner=runner, loaded=loaded, blocks=blocks, inputs=recorder.take())
    runner.close()


def worst(context: Context, keep: Keep, bits: int) -> float:
    """The largest error over all blocks, relative to the root mean square of their numbers."""
    xquant = Xquant(context.loaded.config, context.loaded.weights, keep=keep, bits=bits)
    errors = []
    for i, before in enumerate(context.blocks):
        span = slice(i * BLOCK, (i + 1) * BLOCK)
        data = xquant.encode(context.inputs[:, span])
        assert len(data) == xquant.block_bytes(BLOCK)
        after = xquant.rematerialise(data, np.arange(span.start, span.stop))
        for old, new in ((before.keys, after.keys), (before.values, after.values)):
            assert old.shape == new.shape
            errors.append(float(np.abs(old - new).max() / np.sqrt(np.square(old).mean())))
    return max(errors)


@pytest.mark.parametrize("keep", list(Keep))
def test_eight_bits_of_input_give_nearly_the_same_keys_and_values(context: Context, keep: Keep) -> None:
    assert worst(context, keep, 8) < 0.05


@pytest.mark.parametrize("keep", list(Keep))
def test_fewer_bits_cost_more(context: Context, keep: Keep) -> None:
    assert worst(context, keep, 8) < worst(context, keep, 4) < worst(context, keep, 2)


def test_an_input_takes_half_of_keys_and_values_only_where_each_head_has_its_own(context: Context) -> None:
    config = context.loaded.config
    kept = Xquant(config, context.loaded.weights, keep=Keep.INPUT, bits=8).block_bytes(BLOCK)
    pair = 2 * config.n_kv_heads * config.head_dim * config.n_layers * (BLOCK + 4)
    assert kept / pair == {4: 0.5, 2: 1.0}[config.n_kv_heads]


def test_rematerialised_blocks_serve_in_the_pool(context: Context) -> None:
    runner, shape = context.runner, context.runner.info.shape
    xquant = Xquant(context.loaded.config, context.loaded.weights, keep=Keep.LATENT, bits=8)
    before = runner.score(TOKENS)[2 * BLOCK :]
    for block in range(2):
        with runner.block_view(block) as view:
            view[:] = bytes(len(view))
    emptied = np.abs(runner.score(TOKENS, known=2 * BLOCK) - before).mean()
    for block in range(2):
        span = slice(block * BLOCK, (block + 1) * BLOCK)
        found = xquant.rematerialise(xquant.encode(context.inputs[:, span]), np.arange(span.start, span.stop))
        with runner.block_view(block) as view:
            write_pages(found, shape, 0, view)
    after = runner.score(TOKENS, known=2 * BLOCK)
    assert np.abs(after - before).mean() < 0.1 * emptied


def test_what_is_damaged_or_no_number_is_refused(context: Context) -> None:
    xquant = Xquant(context.loaded.config, context.loaded.weights, keep=Keep.INPUT, bits=4)
    inputs = context.inputs[:, :BLOCK]
    with pytest.raises(DataCorrupt, match="bytes"):
        xquant.rematerialise(xquant.encode(inputs)[:-1], np.arange(BLOCK))
    with pytest.raises(InvalidArgument, match="NaN"):
        xquant.encode(np.where(inputs == inputs[0, 0, 0], np.nan, inputs))
    with pytest.raises(InvalidArgument, match="bits"):
        Xquant(context.loaded.config, context.loaded.weights, keep=Keep.INPUT, bits=3)


def test_codebooks_come_from_a_models_own_blocks(tmp_path: Path) -> None:
    folder = write_tiny_llama(tmp_path / "model")
    book = train_codebook(str(folder), "many words " * 60, tmp_path, tokens=640)
    assert book.centroids.shape == (2, 2, 2, 8, 256, 2)
    assert (book.model, len(book.revision) > 0) == (resolve(str(folder)).name, True)
    with pytest.raises(InvalidArgument, match="longer text"):
        train_codebook(str(folder), "too short " * 10, tmp_path, tokens=640)
