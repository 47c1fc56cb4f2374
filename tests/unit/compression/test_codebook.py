"""Codebooks: their training, their file, and whose blocks they decode."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from covey.compression import Codebook, Pq4, decode, encode
from covey.compression.codebook import pages_of, pairs_of, train
from covey.compression.pages import Pages
from covey.errors import DataCorrupt, InvalidArgument, LayoutMismatch
from tests.unit.compression.blocks import codebook_for, pages_for, payload_for, shape_of

SHAPE = shape_of(layers=1, heads=1, width=4, tokens=64)


def relative_error(book: Codebook, pages: Pages) -> float:
    codec = Pq4(book)
    off = pairs_of(codec.unpack(codec.pack(pages), SHAPE, 0)) - pairs_of(pages)
    return float(np.sqrt(np.square(off).mean() / np.square(pairs_of(pages)).mean()))


def test_training_beats_centroids_taken_from_the_text() -> None:
    blocks = [pages_for(SHAPE, seed) for seed in range(40)]
    untrained, trained = (
        train(blocks[:30], model="m", revision="r", rounds=rounds, rng=np.random.default_rng(0)) for rounds in (0, 8)
    )
    held_out = [(relative_error(untrained, pages), relative_error(trained, pages)) for pages in blocks[30:]]
    assert np.mean([after for _, after in held_out]) < 0.9 * np.mean([before for before, _ in held_out])


def test_too_short_a_text_is_refused() -> None:
    with pytest.raises(InvalidArgument, match="longer text"):
        train([pages_for(SHAPE, 0)], model="m", revision="r", rounds=1, rng=np.random.default_rng(0))


def test_pairs_are_neighbours_and_come_back() -> None:
    shape = shape_of(layers=2, heads=3, width=6, tokens=5)
    pages = pages_for(shape, 0)
    pairs = pairs_of(pages)
    assert pairs.shape == (2, 2, 3, 3, 5, 2)
    assert (pairs[1, 0, 2, 1, 4] == pages.keys[1, 2, 2:4, 4]).all()
    assert (pairs[1, 1, 2, 1, 4] == pages.values[1, 2, 4, 2:4]).all()
    again = pages_of(pairs)
    assert (again.keys == pages.keys).all()
    assert (again.values == pages.values).all()


def test_a_file_comes_back_with_its_identity() -> None:
    book = codebook_for(SHAPE)
    again = Codebook.from_bytes(book.to_bytes())
    assert (again.id, again.model, again.revision) == (book.id, "m", "r")
    assert (again.centroids == book.centroids).all()
    assert codebook_for(SHAPE, revision="s").id != book.id != codebook_for(SHAPE, seed=1).id


@given(st.data())
@settings(max_examples=50)
def test_a_damaged_file_is_told(data: st.DataObject) -> None:
    file = bytearray(codebook_for(SHAPE).to_bytes())
    at = data.draw(st.integers(0, len(file) - 1))
    file[at] ^= data.draw(st.integers(1, 255))
    with pytest.raises(DataCorrupt, match="train it again"):
        Codebook.from_bytes(bytes(file[: data.draw(st.sampled_from((len(file), at)))]))


def test_a_block_of_another_codebook_is_another_layout() -> None:
    stored = encode(Pq4(codebook_for(SHAPE)), memoryview(payload_for(SHAPE, 0)), SHAPE)
    out = memoryview(bytearray(SHAPE.size_bytes))
    with pytest.raises(LayoutMismatch, match="another codebook"):
        decode(Pq4(codebook_for(SHAPE, seed=1)), stored, SHAPE, out)
    other = shape_of(layers=1, heads=2, width=4, tokens=64)
    with pytest.raises(LayoutMismatch, match="another model"):
        encode(Pq4(codebook_for(SHAPE)), memoryview(payload_for(other, 0)), other)


def test_centroids_of_the_wrong_form_are_refused() -> None:
    with pytest.raises(InvalidArgument, match="256"):
        Codebook(model="m", revision="r", centroids=np.zeros((1, 2, 1, 1, 16, 2), dtype=np.float16))
