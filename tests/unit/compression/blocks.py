"""Shapes and payloads for the tests of codecs."""

from __future__ import annotations

import numpy as np
from hypothesis import strategies as st

from covey.compression import Codebook, Codec, Fp16, Int8, Pq4
from covey.compression.pages import Floats, Pages, raw_bytes, write_pages
from covey.types.block import BlockShape, KvElement

ELEMENTS = (KvElement.FP32, KvElement.FP16, KvElement.INT8)


def shape_of(
    *, layers: int = 2, heads: int = 2, width: int = 8, tokens: int = 4, element: KvElement = KvElement.FP32
) -> BlockShape:
    named = BlockShape(size_bytes=1, layers=layers, element=element, kv_heads=heads, head_dim=width, tokens=tokens)
    return BlockShape(
        size_bytes=raw_bytes(named), layers=layers, element=element, kv_heads=heads, head_dim=width, tokens=tokens
    )


shapes = st.builds(
    shape_of,
    layers=st.integers(1, 3),
    heads=st.integers(1, 3),
    width=st.sampled_from((2, 8, 12)),
    tokens=st.integers(1, 6),
    element=st.sampled_from(ELEMENTS),
)


def pages_for(shape: BlockShape, seed: int, scale: float = 1.0) -> Pages:
    """Numbers as keys and values have them: channels of different size and offset."""
    rng = np.random.default_rng(seed)
    full = (shape.layers, shape.kv_heads, shape.tokens, shape.head_dim)

    def numbers() -> Floats:
        found = rng.normal(size=full) * rng.exponential(size=(1, 1, 1, full[3])) + rng.normal(size=(1, 1, 1, full[3]))
        return np.asarray(scale * found, dtype=np.float32)

    return Pages(keys=np.ascontiguousarray(numbers().swapaxes(2, 3)), values=numbers())


def payload_for(shape: BlockShape, seed: int, scale: float = 1.0) -> bytearray:
    payload = bytearray(shape.size_bytes)
    write_pages(pages_for(shape, seed, scale), shape, 0, memoryview(payload))
    return payload


def codebook_for(shape: BlockShape, *, seed: int = 0, revision: str = "r") -> Codebook:
    outer = (shape.layers, 2, shape.kv_heads, shape.head_dim // 2)
    centroids = np.random.default_rng(seed).normal(size=(*outer, 256, 2)).astype(np.float16)
    return Codebook(model="m", revision=revision, centroids=centroids)


def codecs_for(shape: BlockShape) -> list[Codec]:
    return [Fp16(), Int8(), Pq4(codebook_for(shape))]
