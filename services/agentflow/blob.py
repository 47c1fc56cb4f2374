"""Values too large for the journal: a content-addressed directory, a part for each tenant, durable before named."""

from __future__ import annotations

import os
import re
import secrets
from hashlib import blake2b
from pathlib import Path

from anyio import to_thread

from covey.errors import DataCorrupt, NoSpace, NotFound
from covey.policy.flow_event import Value
from covey.types.ids import TenantId

INLINE_BYTES_MAX = 16 * 1024
"""Larger values are blobs: the journal holds their digest."""
DIGEST_BYTES = 32
_DIGEST = re.compile(r"[0-9a-f]{64}")


class Blobs:
    """Written once, fsynced with the directory before `put` returns, checked on every read."""

    def __init__(self, root: Path) -> None:
        self._root = root

    async def store(self, tenant: TenantId, text: str) -> Value:
        """Return the journal's form of a text, after writing the blob that it names. Raises `NoSpace`."""
        data = text.encode()
        if len(data) <= INLINE_BYTES_MAX:
            return Value(size_bytes=len(data), text=text)
        return Value(size_bytes=len(data), blob=await self.put(tenant, data))

    async def load(self, tenant: TenantId, value: Value) -> str:
        """Return the text of a value. Raises `NotFound` and `DataCorrupt`."""
        return value.text if not value.blob else (await self.get(tenant, value.blob)).decode()

    async def put(self, tenant: TenantId, data: bytes) -> str:
        """Write and return the digest; the same content is written once. Raises `NoSpace`."""
        digest = blake2b(data, digest_size=DIGEST_BYTES).hexdigest()
        try:
            await to_thread.run_sync(_write, self._path(tenant, digest), data)
        except OSError as error:
            raise NoSpace(f"the blob store cannot write: {error.strerror}", retry_after_ms=1000) from error
        return digest

    async def get(self, tenant: TenantId, digest: str) -> bytes:
        """Read what `put` wrote.

        Raises:
            NotFound: there is no such blob.
            DataCorrupt: its content is not what its name says.
        """
        if not _DIGEST.fullmatch(digest):
            raise NotFound("there is no such blob")
        try:
            data = await to_thread.run_sync(self._path(tenant, digest).read_bytes)
        except FileNotFoundError as error:
            raise NotFound(f"blob {digest[:12]} is gone") from error
        if blake2b(data, digest_size=DIGEST_BYTES).hexdigest() != digest:
            raise DataCorrupt(f"blob {digest[:12]} is damaged")
        return data

    def _path(self, tenant: TenantId, digest: str) -> Path:
        part = blake2b(tenant.encode(), digest_size=16).hexdigest()  # a tenant's name need not be a file name
        return self._root / part / digest[:2] / digest


def _write(path: Path, data: bytes) -> None:
    if path.exists():
        return
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        with draft.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)
    for directory in (path.parent, path.parent.parent, path.parent.parent.parent):  # new names are durable too
        handle = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
