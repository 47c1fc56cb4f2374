"""Vectors of the benchmark's texts: computed once with the service's own encoder, kept in a file by text hash."""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b, file_digest
from pathlib import Path

import numpy as np
from rich.progress import Progress

from services.semcache.minilm import SentenceModel
from services.semcache.vectors import Vectors

KEY_BYTES = 16
CHUNK_TEXTS = 256


class VectorFile:
    """Vectors by text, appended to a file as they are computed; a torn tail is cut off.

    A record is the text's hash, one byte that says whether the encoder could read the text, and its vector.
    """

    def __init__(self, folder: Path, model: Path, *, threads: int, batch_max: int) -> None:
        """Open the file of this encoder in `folder`; the encoder itself is loaded when a text is new."""
        with (model / "model.safetensors").open("rb") as weights:
            fingerprint = file_digest(weights, "sha256").hexdigest()[:16]
        folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / f"vectors-{fingerprint}.bin"
        self._model, self._threads, self._batch_max = model, threads, batch_max
        self._encoder: SentenceModel | None = None
        self.dim = 384
        self._known: dict[bytes, Vectors | None] = {}
        self._read()

    def missing(self, texts: Sequence[str]) -> list[str]:
        """The texts without a vector so far, shortest first: equal lengths make full batches."""
        return sorted((text for text in dict.fromkeys(texts) if _key(text) not in self._known), key=len)

    def fill(self, texts: Sequence[str], progress: Progress | None = None) -> None:
        """Encode what is missing and append it."""
        todo = self.missing(texts)
        if not todo:
            return
        task = progress.add_task("encoding texts", total=len(todo)) if progress is not None else None
        if self._encoder is None:
            self._encoder = SentenceModel(self._model, threads=self._threads, batch_max=self._batch_max)
        with self._path.open("ab") as file:
            for start in range(0, len(todo), CHUNK_TEXTS):
                chunk = todo[start : start + CHUNK_TEXTS]
                for text, encoded in zip(chunk, self._encoder.encode(chunk), strict=True):
                    vector = encoded.vector
                    self._known[_key(text)] = vector
                    kept = vector if vector is not None else np.zeros(self.dim, np.float32)
                    file.write(_key(text) + bytes([vector is not None]) + kept.astype("<f4").tobytes())
                file.flush()
                if progress is not None and task is not None:
                    progress.advance(task, len(chunk))

    def vector(self, text: str) -> Vectors | None:
        """The unit vector of a filled text; None when it is too long for the encoder. Raises `KeyError`."""
        return self._known[_key(text)]

    def _read(self) -> None:
        if not self._path.exists():
            return
        size = KEY_BYTES + 1 + 4 * self.dim
        data = self._path.read_bytes()
        whole = len(data) // size
        if len(data) % size:
            with self._path.open("r+b") as file:
                file.truncate(whole * size)
        for at in range(0, whole * size, size):
            key, readable = data[at : at + KEY_BYTES], data[at + KEY_BYTES]
            vector = np.frombuffer(data, "<f4", count=self.dim, offset=at + KEY_BYTES + 1)
            self._known[key] = vector if readable else None


def _key(text: str) -> bytes:
    return blake2b(text.encode(), digest_size=KEY_BYTES).digest()
