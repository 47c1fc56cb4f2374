"""Opening the library that a configuration describes: its documents, its index files, its tables."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from structlog.typing import FilteringBoundLogger

from covey.clock import Clock
from covey.policy.reuse import CategoryPolicy

from .config import Config
from .documents import Documents, MemoryDocuments
from .library import Library
from .quota import Quota
from .segment_files import SegmentFiles
from .sqlite import SqliteDocuments
from .store import Store

MEMORY = "memory:"
REDIS = ("redis://", "rediss://", "valkey://", "valkeys://")
DOCUMENTS, INDEX = "documents.sqlite3", "index"


@asynccontextmanager
async def open_library(
    config: Config, *, encoder: str, clock: Clock, log: FilteringBoundLogger
) -> AsyncIterator[Library]:
    """Open what `config` names, with every entry of earlier processes, for a block; raises what the documents raise."""
    async with open_documents(config, clock, log) as documents:
        folder = folder_of(config)
        library = Library(
            open_store(config),
            documents,
            encoder=encoder,
            recent_bytes_max=config.recent_bytes_max,
            clock=clock,
            log=log,
            files=SegmentFiles(folder / INDEX, encoder, log) if folder is not None else None,
        )
        policies = {policy.name: policy for policy in config.policies()}
        await library.restore(lambda category: quota_of(policies.get(category)))
        yield library


@asynccontextmanager
async def open_documents(config: Config, clock: Clock, log: FilteringBoundLogger) -> AsyncIterator[Documents]:
    """Open the documents that `config` names for a block."""
    if config.documents.startswith(REDIS):
        from .redis_documents import RedisDocuments

        async with RedisDocuments.open(config.documents, clock=clock, log=log) as shared:
            yield shared
        return
    folder = folder_of(config)
    if folder is None:
        yield MemoryDocuments()
        return
    async with SqliteDocuments.open(
        folder / DOCUMENTS, clock=clock, log=log, size_bytes_max=config.documents_bytes_max
    ) as documents:
        yield documents


def open_store(config: Config) -> Store:
    """Empty tables within the bounds of `config`."""
    has_limit = config.tenant_entries_max or config.tenant_size_bytes_max
    tenant = Quota(entries=config.tenant_entries_max or config.entries_max, size_bytes=config.tenant_size_bytes_max)
    return Store(
        entries_max=config.entries_max,
        size_bytes_max=config.size_bytes_max,
        tail_max=config.exact_search_max,
        tenant=tenant if has_limit else None,
    )


def folder_of(config: Config) -> Path | None:
    """Where the documents and graphs of this worker lie; None when nothing is kept on this machine's disk."""
    if config.documents == MEMORY:
        return None
    is_path = config.documents and not config.documents.startswith(REDIS)
    return Path(config.documents) if is_path else Path(config.run_dir) / "semcache" / (config.worker or "own")


def quota_of(policy: CategoryPolicy | None) -> tuple[int, int]:
    """The quota of a category in entries and bytes; nothing for one that is no more."""
    return (policy.quota_entries, policy.quota_bytes) if policy is not None else (0, 0)
