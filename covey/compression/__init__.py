"""Codecs of stored blocks: numpy only, sans-I/O, so that nodes of the store use them without an engine."""

from __future__ import annotations

from covey.compression.codebook import Codebook
from covey.compression.codec import Codec, decode, encode, encoded
from covey.compression.codecs import Codecs
from covey.compression.fp16 import Fp16
from covey.compression.int8 import Int8
from covey.compression.pq4 import Pq4

__all__ = ["Codebook", "Codec", "Codecs", "Fp16", "Int8", "Pq4", "decode", "encode", "encoded"]
