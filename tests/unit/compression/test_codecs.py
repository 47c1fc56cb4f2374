"""Every codec: sizes known in advance, bounded errors, layers apart, and no damage that is more than an error."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from covey.compression import Codec, Codecs, Fp16, Int8, Pq4, decode, encode, encoded
from covey.compression.codebook import pairs_of
from covey.compression.pages import Floats, read_pages
from covey.errors import DataCorrupt, InvalidArgument, LayoutMismatch
from covey.types.block import BlockCodec, BlockShape, KvElement
from tests.unit.compression.blocks import codebook_for, codecs_for, pages_for, payload_for, shape_of, shapes

seeds = st.integers(0, 2**32 - 1)
which = st.integers(0, 2)


def restored(codec: Codec, payload: bytes | bytearray, shape: BlockShape) -> bytearray:
    out = bytearray(shape.size_bytes)
    decode(codec, encode(codec, memoryview(payload), shape), encoded(codec, shape), memoryview(out))
    return out


def errors(codec: Codec, payload: bytes | bytearray, shape: BlockShape) -> list[tuple[Floats, Floats]]:
    """Keys and values before, and how far off they are afterwards."""
    before = read_pages(memoryview(payload), shape)
    after = read_pages(memoryview(restored(codec, payload, shape)), shape)
    return [(before.keys, np.abs(after.keys - before.keys)), (before.values, np.abs(after.values - before.values))]


@given(shape=shapes, seed=seeds, codec=which)
def test_the_size_is_known_before_and_the_same_for_every_layer(shape: BlockShape, seed: int, codec: int) -> None:
    found = codecs_for(shape)[codec]
    stored = encoded(found, shape)
    assert len(encode(found, memoryview(payload_for(shape, seed)), shape)) == stored.size_bytes
    assert stored.size_bytes == shape.layers * found.layer_bytes(shape)


@given(shape=shapes, seed=seeds, scale=st.sampled_from((1e-6, 1.0, 300.0)))
def test_half_precision_is_off_by_a_rounding(shape: BlockShape, seed: int, scale: float) -> None:
    step_of_int8 = 1 / 127 if shape.element is KvElement.INT8 else 2.0**-11
    for before, off in errors(Fp16(), payload_for(shape, seed, scale), shape):
        largest = np.abs(before).max()
        assert (off <= largest * (2.0**-11 + step_of_int8) + 2.0**-24).all()


@given(seed=seeds, tokens=st.integers(1, 6), scale=st.sampled_from((1e-6, 1.0, 300.0)))
def test_eight_bits_are_off_by_half_a_step_of_their_group(seed: int, tokens: int, scale: float) -> None:
    shape = shape_of(tokens=tokens)
    for before, off in errors(Int8(), payload_for(shape, seed, scale), shape):
        span = before.max(axis=-1, keepdims=True) - before.min(axis=-1, keepdims=True)
        slack = np.abs(before).max(axis=-1, keepdims=True) * 2.0**-10 / 255 + 2.0**-23
        assert (off <= 0.51 * span / 255 * (1 + 2.0**-9) + slack).all()


@given(shape=shapes, seed=seeds)
def test_four_bits_are_the_nearest_pair_of_the_codebook(shape: BlockShape, seed: int) -> None:
    book = codebook_for(shape, seed=seed)
    pages = pages_for(shape, seed)
    codec = Pq4(book)
    points, found = pairs_of(pages), pairs_of(codec.unpack(codec.pack(pages), shape, 0))
    centroids = book.centroids.astype(np.float32)
    every = np.linalg.norm(points[..., None, :] - centroids[:, :, :, :, None], axis=-1)
    assert np.linalg.norm(points - found, axis=-1) == pytest.approx(every.min(axis=-1), abs=1e-2)
    assert (np.linalg.norm(found[..., None, :] - centroids[:, :, :, :, None], axis=-1).min(axis=-1) == 0).all()


@given(shape=shapes, seed=seeds, codec=which, data=st.data())
def test_layers_are_decoded_alone(shape: BlockShape, seed: int, codec: int, data: st.DataObject) -> None:
    found = codecs_for(shape)[codec]
    payload = payload_for(shape, seed)
    first = data.draw(st.integers(0, shape.layers - 1))
    last = data.draw(st.integers(first + 1, shape.layers))
    whole = restored(found, payload, shape)
    size, raw = found.layer_bytes(shape), shape.size_bytes // shape.layers
    stored = encode(found, memoryview(payload), shape)
    out = bytearray(shape.size_bytes)
    decode(found, stored[first * size : last * size], shape, memoryview(out), first_layer=first, last_layer=last)
    assert out[first * raw : last * raw] == whole[first * raw : last * raw]
    assert not any(out[: first * raw])
    assert not any(out[last * raw :])


@given(shape=shapes, seed=seeds, codec=which, noise=st.binary(min_size=1, max_size=64))
@settings(max_examples=200)
def test_damage_is_an_error_or_finite_numbers(shape: BlockShape, seed: int, codec: int, noise: bytes) -> None:
    found = codecs_for(shape)[codec]
    stored = bytearray(encode(found, memoryview(payload_for(shape, seed)), shape))
    at = seed % len(stored)
    stored[at : at + len(noise)] = noise[: len(stored) - at]
    out = bytearray(shape.size_bytes)
    try:
        decode(found, bytes(stored), shape, memoryview(out))
    except (DataCorrupt, LayoutMismatch):
        return
    pages = read_pages(memoryview(out), shape)
    assert np.isfinite(pages.keys).all()
    assert np.isfinite(pages.values).all()


@given(shape=shapes, codec=which, cut=st.integers(-3, 3).filter(bool))
def test_a_wrong_length_is_damage(shape: BlockShape, codec: int, cut: int) -> None:
    found = codecs_for(shape)[codec]
    stored = encode(found, memoryview(payload_for(shape, 0)), shape)
    wrong = stored[:cut] if cut < 0 else stored + bytes(cut)
    with pytest.raises(DataCorrupt, match="bytes each"):
        decode(found, wrong, shape, memoryview(bytearray(shape.size_bytes)))


@pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("codec", range(3))
def test_what_is_not_a_number_is_never_encoded(codec: int, wrong: float) -> None:
    shape = shape_of()
    payload = payload_for(shape, 0)
    np.frombuffer(payload, dtype="<f4")[7] = wrong
    with pytest.raises(InvalidArgument, match="NaN"):
        encode(codecs_for(shape)[codec], memoryview(payload), shape)


@pytest.mark.parametrize("codec", [Fp16(), Int8()])
def test_numbers_beyond_the_codec_are_refused(codec: Codec) -> None:
    shape = shape_of()
    payload = payload_for(shape, 0)
    np.frombuffer(payload, dtype="<f4")[7] = 1e9
    with pytest.raises(InvalidArgument, match=r"large|half"):
        encode(codec, memoryview(payload), shape)


def test_equal_numbers_come_back_as_they_were() -> None:
    shape = shape_of()
    payload = np.full(shape.size_bytes // 4, 0.5, dtype="<f4").tobytes()
    assert bytes(restored(Int8(), payload, shape)) == payload
    assert bytes(restored(Fp16(), bytes(len(payload)), shape)) == bytes(len(payload))


def test_blocks_whose_numbers_are_unknown_are_refused() -> None:
    opaque = BlockShape(size_bytes=128, layers=2)
    with pytest.raises(LayoutMismatch, match="named"):
        encode(Int8(), bytes(128), opaque)
    with pytest.raises(LayoutMismatch, match="named"):
        encoded(Fp16(), opaque)


def test_layers_that_there_are_not_are_refused() -> None:
    shape = shape_of(layers=2)
    with pytest.raises(InvalidArgument, match="2 layers"):
        decode(Fp16(), b"", shape, memoryview(bytearray(shape.size_bytes)), first_layer=1, last_layer=3)


def test_product_quantisation_is_there_where_a_codebook_is() -> None:
    assert Codecs().names == {BlockCodec.FP16, BlockCodec.INT8}
    with pytest.raises(LayoutMismatch, match="codebook"):
        Codecs().find(BlockCodec.PQ4)
    assert Codecs(codebook_for(shape_of())).find(BlockCodec.PQ4).name is BlockCodec.PQ4


def test_codecs_need_no_torch() -> None:
    code = "import sys, covey.compression; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
