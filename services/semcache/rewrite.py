"""A query whose text says all that it asks: its earlier turns are spelt out in it, or part of its context."""

from __future__ import annotations

from dataclasses import replace
from hashlib import blake2b

from covey.policy.dialogue import spell_out
from covey.types.semcache import CacheQuery


def spelt(query: CacheQuery) -> CacheQuery:
    """Return the query with its text spelt out by its earlier turns, or with these in its context key.

    The latter keeps it among queries of the same history: where the text leans on what only an answer can have said.
    """
    if not query.turns or not query.text:
        return query
    found = spell_out(query.text, query.turns)
    if found.resolved:
        return replace(query, text=found.text)
    return replace(query, context_key=history_key(query))


def history_key(query: CacheQuery) -> bytes:
    """The context key with the earlier turns in it."""
    digest = blake2b(query.context_key, digest_size=16, person=b"covey-turns")
    for turn in query.turns:
        said = turn.encode()
        digest.update(len(said).to_bytes(4, "little") + said)
    return digest.digest()
