"""The sentence encoder through ONNX Runtime, where that is installed: an .onnx file of the model, say in int8."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from covey.errors import InvalidArgument, Unavailable

from .minilm import CHARS_MAX, Encoded
from .vectors import Vectors


class OnnxModel:
    """A transformer with mean pooling. The tokenizer and the longest length come from the model's own folder."""

    def __init__(self, path: Path, folder: Path, *, threads: int, batch_max: int) -> None:
        """Load `path`, an export of the model in `folder`.

        Raises:
            Unavailable: ONNX Runtime is not installed.
            InvalidArgument: there is no such file, or the model does not pool by the mean.
        """
        if find_spec("onnxruntime") is None:
            raise Unavailable("onnxruntime is not installed: install it, or unset encoder_onnx", field="encoder_onnx")
        if not path.is_file():
            raise InvalidArgument(f"there is no file {path}", field="encoder_onnx")
        pooling = json.loads((folder / "1_Pooling" / "config.json").read_text())
        if not pooling.get("pooling_mode_mean_tokens", pooling.get("pooling_mode") == "mean"):
            raise InvalidArgument("only models that pool by the mean run through ONNX", field="encoder_onnx")
        from tokenizers import Tokenizer

        onnxruntime: Any = import_module("onnxruntime")
        options: Any = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        self._session: Any = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        self._inputs = {one.name for one in self._session.get_inputs()}
        self._tokenizer: Any = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokens_max = int(json.loads((folder / "sentence_bert_config.json").read_text())["max_seq_length"])
        self._batch_max = batch_max
        self.dim = int(json.loads((folder / "config.json").read_text())["hidden_size"])

    def encode(self, texts: Sequence[str]) -> list[Encoded]:
        """Return one result a text, in order."""
        ids = [self._ids(text) for text in texts]
        found: list[Encoded] = [Encoded(vector=None, tokens=len(one)) for one in ids]
        short = sorted((at for at, one in enumerate(ids) if len(one) <= self._tokens_max), key=lambda at: len(ids[at]))
        for start in range(0, len(short), self._batch_max):
            batch = short[start : start + self._batch_max]
            for at, vector in zip(batch, self._run([ids[at] for at in batch]), strict=True):
                found[at] = Encoded(vector=vector, tokens=len(ids[at]))
        return found

    def _ids(self, text: str) -> Sequence[int]:
        if len(text) > CHARS_MAX:
            return range(len(text))  # not tokenized: as in `SentenceModel`, its length in characters stands for it
        ids: list[int] = self._tokenizer.encode(text).ids
        return ids

    def _run(self, rows: Sequence[Sequence[int]]) -> Vectors:
        longest = max(map(len, rows))
        ids = np.zeros((len(rows), longest), dtype=np.int64)
        mask = np.zeros_like(ids)
        for row, one in enumerate(rows):
            ids[row, : len(one)] = one
            mask[row, : len(one)] = 1
        feed = {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}
        states = self._session.run(None, {name: feed[name] for name in self._inputs})[0]
        pooled = (states * mask[:, :, None]).sum(axis=1) / mask.sum(axis=1, keepdims=True)
        vectors: Vectors = (pooled / np.linalg.norm(pooled, axis=1, keepdims=True)).astype(np.float32)
        return vectors


def file_fingerprint(path: Path) -> str:
    """A digest of the file: vectors of another one compare with nothing of it. Raises `InvalidArgument`."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()[:16]
    except OSError as error:
        raise InvalidArgument(f"cannot read {path}: {error}", field="encoder_onnx") from error
