"""One stored answer and what it answers: whole on disk, a handle of it in memory."""

from __future__ import annotations

from array import array
from dataclasses import dataclass
from hashlib import blake2b
from typing import NamedTuple

from covey.errors import InvalidArgument
from covey.policy.reuse import Candidate
from covey.types.generate import FinishReason
from covey.types.ids import TenantId
from covey.types.semcache import CachedAnswer, CacheOffer

OVERHEAD_BYTES = 1024
"""What an entry costs beside its texts and tokens: its places in the tables and on disk."""
LABEL_BITS = 60
"""As many as Python keeps in two digits: there is one of these numbers an entry."""


class Scope(NamedTuple):
    """Whose entries these are; nothing ever crosses it."""

    tenant: TenantId
    model: str


class Partition(NamedTuple):
    """The unit of quota."""

    scope: Scope
    category: str


class Shelf(NamedTuple):
    """Entries that may stand for each other: one partition, and everything but the last user turn equal."""

    partition: Partition
    context_key: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Held:
    """What the tables know of an entry, times in seconds of the process's clock; the rest is in its document."""

    label: int
    shelf: Shelf
    stored_at: float
    expires_at: float
    size_bytes: int

    @property
    def id(self) -> str:
        return entry_id(self.label)

    @property
    def scope(self) -> Scope:
        return self.shelf.partition.scope


@dataclass(frozen=True, slots=True, kw_only=True)
class Document:
    """A stored answer, whole; immutable. `asked_category` is what the request named, `shelf` what it was filed under.

    `vector` holds little-endian fp32 of `encoder`'s making; empty when the text was not encoded.
    """

    label: int
    shelf: Shelf
    asked_category: str
    exact_key: bytes
    text: str
    answer: str
    token_ids: array[int]
    reason: FinishReason
    prompt_tokens: int
    completion_tokens: int
    stored_at: float
    expires_at: float
    size_bytes: int
    tags: tuple[str, ...] = ()
    vector: bytes = b""
    encoder: str = ""

    @property
    def id(self) -> str:
        return entry_id(self.label)

    @property
    def scope(self) -> Scope:
        return self.shelf.partition.scope

    @property
    def exact_hash(self) -> int:
        """What the tables file it under; 0 for a request that no other one can equal."""
        return hash_of(self.scope, self.asked_category, self.exact_key) if self.exact_key else 0

    def answers(self, scope: Scope, category: str, exact_key: bytes) -> bool:
        """Whether it is the answer to exactly this request: hashes may collide, these may not."""
        return (self.scope, self.asked_category, self.exact_key) == (scope, category, exact_key)

    def candidate(self, similarity: float = 1.0) -> Candidate:
        """What the policy sees of this entry."""
        return Candidate(
            entry=self.id,
            text=self.text,
            stored_at=self.stored_at,
            similarity=similarity,
            answer=answer_hash(self.answer),
        )

    def replay(self, now: float) -> CachedAnswer:
        """The answer as the gateway replays it."""
        return CachedAnswer(
            entry=self.id,
            text=self.answer,
            ids=tuple(self.token_ids),
            reason=self.reason,
            prompt_tokens=self.prompt_tokens,
            completion_tokens=self.completion_tokens,
            age_s=max(0.0, now - self.stored_at),
        )


def answer_hash(answer: str) -> int:
    """Equal for equal answers within this process, never 0; a string computes its own once."""
    return hash(answer) or 1


def entry_id(label: int) -> str:
    """An entry's name outside of this process."""
    return f"{label:016x}"


def label_of(entry: str) -> int | None:
    """The label of an entry's name; None for what is no name."""
    try:
        label = int(entry, 16)
    except ValueError:
        return None
    return label if entry_id(label) == entry else None


def hash_of(scope: Scope, category: str, exact_key: bytes) -> int:
    """64 bits of who asks and what, never 0."""
    return _digest(scope.tenant.encode(), scope.model.encode(), category.encode(), exact_key)


def _digest(*parts: bytes) -> int:
    digest = blake2b(digest_size=8, person=b"covey-entry")
    for part in parts:  # with lengths: no tenant's name may run into what follows it
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return int.from_bytes(digest.digest(), "little") or 1


def pack_ids(ids: tuple[int, ...]) -> array[int]:
    """Token ids at four bytes each; raises `InvalidArgument` for a number that is no token id."""
    try:
        return array("I", ids)
    except (OverflowError, TypeError) as error:
        raise InvalidArgument("token ids lie between 0 and 2**32 - 1", field="ids") from error


def size_of(offer: CacheOffer, dim: int) -> int:
    """Bytes that an entry for `offer` is accounted with; `dim` is 0 for one without a vector."""
    texts = len(offer.text.encode()) + len(offer.query.text.encode())
    return OVERHEAD_BYTES + texts + 4 * len(offer.ids) + (6 * dim if dim else 0)
