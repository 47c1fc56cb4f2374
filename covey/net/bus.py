"""Control messages between processes: at most once, small, never content; durable needs use the journal."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Final, Protocol

from covey.errors import InvalidArgument, PayloadTooLarge

PAYLOAD_BYTES_MAX: Final = 256 * 1024
SCHEMA: Final = 1
"""Version of the payloads of `covey.types.event`; each carries it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BusMessage:
    """One message as it came; the payload is unchecked bytes."""

    subject: str
    payload: bytes
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """One entry of a stream; `seq` counts from 1."""

    seq: int
    subject: str
    payload: bytes


class Change(StrEnum):
    PUT = "PUT"
    GONE = "GONE"


@dataclass(frozen=True, slots=True, kw_only=True)
class KvChange:
    """What happened to a key of a bucket. A key whose time-to-live ended is `GONE` too where the bus can tell."""

    key: str
    change: Change
    value: bytes = b""
    revision: int = 0


class Subscription(Protocol):
    """Messages of a subject in the order of arrival. When it is full the newest are dropped and counted."""

    @property
    def dropped(self) -> int: ...

    def __aiter__(self) -> AsyncIterator[BusMessage]: ...

    async def __anext__(self) -> BusMessage: ...


class Bucket(Protocol):
    """A small key-value bucket whose entries end `ttl_s` after their last `put`."""

    async def put(self, key: str, value: bytes, *, revision: int | None = None) -> int:
        """Store and return the revision; with `revision`, only if that is still the newest one (0: never put).

        Raises:
            Fenced: the key has another revision.
            Unavailable: the bus is down; the value may or may not be stored.
            PayloadTooLarge: over 256 KiB.
        """
        ...

    async def get(self, key: str) -> KvChange | None:
        """Return a key's value and revision, None when there is none. Raises `Unavailable` while the bus is down."""
        ...

    async def delete(self, key: str) -> None: ...

    async def entries(self) -> Mapping[str, bytes]:
        """Return all that is there. Raises `Unavailable` while the bus is down."""
        ...

    def watch(self) -> AbstractAsyncContextManager[AsyncIterator[KvChange]]:
        """Follow the bucket from its present content on; ends when the connection or the bucket is lost.

        A value that was refused for its `revision` may be heard too: where such are put, read the key.
        """
        ...


class Stream(Protocol):
    """A durable journal."""

    async def append(
        self, subject: str, payload: bytes, *, expected_seq: int | None = None, msg_id: str | None = None
    ) -> int:
        """Store a record and return its sequence number, once it is on disk.

        `expected_seq` is the last sequence number of this subject (0: none yet). The same `msg_id` within two
        minutes is stored once and answers with the first one's number.

        Raises:
            Fenced: another record came first.
            NoSpace: the stream is full.
            Unavailable: no answer; the record may or may not be stored, so repeat it with the same `msg_id`.
            PayloadTooLarge: over 256 KiB.
        """
        ...

    def read(self, subject_filter: str, from_seq: int = 1) -> AsyncIterator[Record]:
        """Yield what is stored now, from a sequence number on, then end. Raises `Unavailable`."""
        ...

    async def purge(self, subject: str) -> None:
        """Delete all records of a subject."""
        ...


class Bus(Protocol):
    """A connection to the control plane that reconnects by itself for ever."""

    @property
    def connected(self) -> bool: ...

    @property
    def connections(self) -> int:
        """How often the connection was made: it grows with every reconnect."""
        ...

    async def publish(self, subject: str, payload: bytes, *, headers: Mapping[str, str] | None = None) -> None:
        """Send to whoever listens.

        Raises:
            PayloadTooLarge: over 256 KiB, refused before it is sent.
            Unavailable: not connected, or too much is waiting to be sent; nothing is kept for later.
        """
        ...

    def subscribe(self, subject: str, *, capacity: int = 1024) -> AbstractAsyncContextManager[Subscription]:
        """Listen for a block; `*` and a last `>` are wildcards. It goes on after a reconnect."""
        ...

    async def kv(self, bucket: str, *, ttl_s: float | None = None, storage: str = "memory") -> Bucket:
        """Open a bucket, made if it is not there. Raises `Unavailable`."""
        ...

    async def stream(self, name: str, subjects: tuple[str, ...], *, bytes_max: int = ...) -> Stream:
        """Open a journal on disk, made if it is not there; full, it refuses new records. Raises `Unavailable`."""
        ...

    async def until_connected(self) -> None:
        """Wait for the connection, or return at once."""
        ...


def check_payload(payload: bytes) -> None:
    """Raise `PayloadTooLarge` for what must not travel on the bus."""
    if len(payload) > PAYLOAD_BYTES_MAX:
        raise PayloadTooLarge(
            f"a bus message of {len(payload)} bytes: at most {PAYLOAD_BYTES_MAX} are carried, gRPC takes larger ones"
        )


def check_subject(subject: str, *, wildcards: bool = False) -> None:
    """Raise `InvalidArgument` unless the subject is words of letters, digits, `-`, `_` joined by dots."""
    words = subject.split(".")
    for at, word in enumerate(words):
        if wildcards and (word == "*" or (word == ">" and at == len(words) - 1)):
            continue
        if not word or not all(c.isascii() and (c.isalnum() or c in "-_=/") for c in word):
            raise InvalidArgument(f"{subject!r} is not a subject", field="subject")


def subject_matches(pattern: str, subject: str) -> bool:
    """Tell whether a subject falls under a pattern with `*` and `>`."""
    wanted, words = pattern.split("."), subject.split(".")
    for at, want in enumerate(wanted):
        if want == ">":
            return len(words) > at
        if at >= len(words) or want not in ("*", words[at]):
            return False
    return len(words) == len(wanted)
