"""Finding the codebook that settings name."""

from __future__ import annotations

from pathlib import Path

from covey.compression import Codebook
from covey.config import ConfigError
from covey.errors import DataCorrupt


def read_codebook(path: str, *, field: str) -> Codebook:
    """Read the file that `covey codebook` wrote. Raises `ConfigError`, naming `field`."""
    try:
        return Codebook.from_bytes(Path(path).read_bytes())
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}", field=field) from error
    except DataCorrupt as error:
        raise ConfigError(f"{path}: {error.message}", field=field) from error
