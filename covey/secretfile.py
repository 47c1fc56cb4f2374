"""Secret files: the only place that secrets are read from, and only when nobody else can read them."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from covey.errors import InvalidArgument

SECRET_BYTES_MAX = 64 * 1024


def read_secret(path: Path | str) -> str:
    """Return the text of a secret file without surrounding white space.

    Raises:
        InvalidArgument: it is missing, empty, too long, no plain file, or open to group or others.
    """
    try:
        handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        with open(handle, "rb") as file:  # noqa: PTH123 - the checked file is the one that is read
            info = os.fstat(handle)
            if not stat.S_ISREG(info.st_mode):
                raise InvalidArgument(f"{path} is not a plain file")
            if info.st_mode & 0o077:
                raise InvalidArgument(f"{path} holds a secret and others may read it: run chmod 600 {path}")
            data = file.read(SECRET_BYTES_MAX + 1)
        text = data.decode().strip()
    except OSError as error:
        raise InvalidArgument(f"cannot read the secret file {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InvalidArgument(f"{path} is not text") from error
    if not text or len(data) > SECRET_BYTES_MAX:
        raise InvalidArgument(f"{path} must hold 1 to {SECRET_BYTES_MAX} bytes")
    return text


def write_secret(path: Path | str, secret: str) -> None:
    """Write a new secret file that only its owner can read. Raises `FileExistsError`: secrets are not replaced."""
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with open(handle, "w") as file:  # noqa: PTH123 - created with its final permissions
        file.write(secret + "\n")
        file.flush()
        os.fsync(file.fileno())
