"""Built graphs on disk, so that a restart need not build them again: a file each, its labels, and a manifest."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

import msgspec
import numpy as np
from structlog.typing import FilteringBoundLogger

from covey import failpoint
from covey.types.ids import TenantId

from .entry import Partition, Scope, Shelf
from .graph import SPACE, Graph, Segment

SCHEMA = 1
GRAPH, LABELS, MANIFEST, DRAFT = ".hnsw", ".labels", ".json", ".draft"
READ_BYTES = 1 << 20


class Manifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What a graph's file must be: hnswlib itself loads a damaged one, or one of another dimension, without a word."""

    schema: int
    space: str
    dim: int
    count: int
    encoder: str
    tenant: str
    model: str
    category: str
    context: bytes
    graph_sha256: str
    labels_sha256: str

    @property
    def shelf(self) -> Shelf:
        return Shelf(Partition(Scope(TenantId(self.tenant), self.model), self.category), self.context)


class SegmentFiles:
    """One folder of graphs of one encoder. Every method is for a thread, one at a time.

    Files are written beside their place, synced and renamed, the manifest last: what has no manifest was never
    finished and is removed. The documents are the truth: whatever is wrong with a graph is logged, and it goes.
    """

    def __init__(self, folder: Path, encoder: str, log: FilteringBoundLogger) -> None:
        self._folder = folder
        self._encoder = encoder
        self._log = log
        self._names: dict[Segment, str] = {}
        self._next = 0

    def load(self) -> Iterator[tuple[Shelf, Graph]]:
        """Yield every whole graph of this encoder; set another encoder's aside, remove what is broken."""
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        named = sorted(self._folder.glob(f"*{MANIFEST}"))
        for path in named:
            name = path.stem
            self._next = max(self._next, int(name) + 1 if name.isdecimal() else 0)
            try:
                manifest = msgspec.json.decode(path.read_bytes(), type=Manifest)
                if manifest.encoder != self._encoder:
                    self._set_aside(name, manifest.encoder)
                    continue
                graph = self._read(name, manifest)
            except (OSError, RuntimeError, ValueError, msgspec.MsgspecError) as error:
                self._log.warning("index file not usable: built again from the documents", file=name, error=str(error))
                self._remove(name)
                continue
            self._names[graph] = name
            yield manifest.shelf, graph
        known = {path.stem for path in named}
        for path in self._folder.iterdir():
            if path.is_file() and path.stem.split(".")[0] not in known:
                path.unlink()

    def save(self, shelf: Shelf, graph: Graph) -> bool:
        """Write a graph that has no file yet; False when the disk would not take it."""
        if graph in self._names:
            return True
        name = f"{self._next:08d}"
        self._next += 1
        try:
            self._write(name, shelf, graph)
        except OSError as error:
            self._log.warning("index file not written: a restart builds it again", error=str(error))
            self._remove(name)
            return False
        self._names[graph] = name
        return True

    def drop(self, segment: Segment) -> None:
        """Remove the file of a graph that serves no more."""
        name = self._names.pop(segment, None)
        if name is not None:
            self._remove(name)

    def keep_only(self, serving: set[Segment]) -> None:
        """Remove the files of all graphs but these."""
        for segment in [segment for segment in self._names if segment not in serving]:
            self.drop(segment)

    def _write(self, name: str, shelf: Shelf, graph: Graph) -> None:
        draft = self._folder / (name + DRAFT)
        graph.save(draft)
        failpoint.hit("semcache.save")
        if not draft.is_file() or draft.stat().st_size < len(graph) * graph.dim * 4:  # hnswlib reports nothing
            raise OSError(f"{draft.name} came out too short")
        _sync(draft)
        graph_sha256 = _digest(draft)
        draft.replace(self._folder / (name + GRAPH))
        labels = graph.labels.astype("<i8").tobytes()
        _write_synced(self._folder / (name + LABELS), labels)
        partition = shelf.partition
        manifest = Manifest(
            schema=SCHEMA,
            space=SPACE,
            dim=graph.dim,
            count=len(graph),
            encoder=self._encoder,
            tenant=partition.scope.tenant,
            model=partition.scope.model,
            category=partition.category,
            context=shelf.context_key,
            graph_sha256=graph_sha256,
            labels_sha256=hashlib.sha256(labels).hexdigest(),
        )
        failpoint.hit("semcache.manifest")
        _write_synced(self._folder / (name + MANIFEST), msgspec.json.encode(manifest))
        _sync(self._folder)

    def _read(self, name: str, manifest: Manifest) -> Graph:
        if (manifest.schema, manifest.space) != (SCHEMA, SPACE):
            raise ValueError(f"schema {manifest.schema}, space {manifest.space}")
        path = self._folder / (name + GRAPH)
        if _digest(path) != manifest.graph_sha256:
            raise ValueError("the graph's checksum is wrong")
        labels = (self._folder / (name + LABELS)).read_bytes()
        if hashlib.sha256(labels).hexdigest() != manifest.labels_sha256 or len(labels) != 8 * manifest.count:
            raise ValueError("the labels' checksum is wrong")
        return Graph.load(path, np.frombuffer(labels, dtype="<i8").astype(np.int64), manifest.dim)

    def _set_aside(self, name: str, encoder: str) -> None:
        """Another encoder's vectors compare with nothing of this one; they wait for its return."""
        aside = self._folder / hashlib.sha256(encoder.encode()).hexdigest()[:16]
        aside.mkdir(mode=0o700, exist_ok=True)
        for suffix in (GRAPH, LABELS, MANIFEST):
            (self._folder / (name + suffix)).replace(aside / (name + suffix))
        self._log.warning("index of another encoder set aside", encoder=encoder, folder=aside.name)

    def _remove(self, name: str) -> None:
        for suffix in (MANIFEST, GRAPH, LABELS, DRAFT):
            (self._folder / (name + suffix)).unlink(missing_ok=True)


def _write_synced(path: Path, data: bytes) -> None:
    draft = path.with_name(path.name + DRAFT)
    with draft.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    draft.replace(path)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while data := file.read(READ_BYTES):
            digest.update(data)
    return digest.hexdigest()
