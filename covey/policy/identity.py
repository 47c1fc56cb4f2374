"""KV identity: what makes two blocks interchangeable, as namespaces and hash chains (design §7)."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from hashlib import blake2b

from covey.types.ids import BlockHash, NamespaceId, RequestId, TenantId

HASH_BYTES = 16
SCHEMA = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Namespace:
    """Everything besides the tokens that the bytes of a block depend on, and the tenant that owns them."""

    tenant: TenantId
    model: str
    revision: str
    tokenizer_hash: str
    precision: str
    kv_dtype: str
    block_size: int
    layout_fingerprint: str
    adapter: str = ""
    schema: int = SCHEMA

    def id(self) -> NamespaceId:
        """Hash of all fields, each with its length, so that no two field lists collide."""
        digest = blake2b(digest_size=HASH_BYTES, person=b"covey-ns")
        for value in astuple(self):
            data = str(value).encode()
            digest.update(struct.pack("<I", len(data)) + data)
        return NamespaceId(digest.digest())


def chain(root: bytes, token_ids: Sequence[int], block_size: int, extras: bytes = b"") -> tuple[BlockHash, ...]:
    """Hash each full block of `token_ids`: `hash[i] = BLAKE2b(hash[i-1] ‖ token ids ‖ extras)`, from `root`."""
    hashes: list[BlockHash] = []
    parent = root
    for start in range(0, len(token_ids) - block_size + 1, block_size):
        parent = _link(parent, token_ids[start : start + block_size], extras)
        hashes.append(BlockHash(parent))
    return tuple(hashes)


def tail_key(parent: bytes, token_ids: Sequence[int], request: RequestId) -> BlockHash:
    """Name of the unfinished last block: private to `request`, never shared."""
    return BlockHash(_link(parent, token_ids, b"tail:" + request.encode()))


def _link(parent: bytes, token_ids: Sequence[int], extras: bytes) -> bytes:
    digest = blake2b(parent, digest_size=HASH_BYTES, person=b"covey-blk")
    digest.update(struct.pack(f"<{len(token_ids)}I", *token_ids))
    digest.update(extras)
    return digest.digest()
