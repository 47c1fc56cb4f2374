"""What the bulk channel says: frames of one fixed header and a payload, and the proof of who knows the mesh token.

A connection carries one exchange at a time:

    server CHALLENGE · client PROOF · server WELCOME
    client READ (a `GetRequest`) · server SUMS, DATA… for each block · server DONE
    client WRITE (a `WriteChunk` without data) · DATA…, for each block, then DONE · server DONE

Instead of what is due a server may send ERROR (an `ErrorDetail`). After an error in a request that it has read whole,
the connection stays usable; after anything else that does not fit, it is closed.
"""

from __future__ import annotations

import hmac
import struct
from dataclasses import dataclass
from enum import IntEnum

from covey.errors import InvalidArgument, PayloadTooLarge
from covey.net.call import Token

MAGIC = b"CVBK"
VERSION = 1
HEADER = struct.Struct("<4sBBHI")
COUNT = struct.Struct("<Q")
NONCE_BYTES = 32
MAC_BYTES = 32
DATA_BYTES_MAX = 4 * 1024 * 1024


class Kind(IntEnum):
    CHALLENGE = 1
    PROOF = 2
    WELCOME = 3
    READ = 4
    WRITE = 5
    SUMS = 6
    DATA = 7
    DONE = 8
    ERROR = 9


LENGTHS: dict[Kind, tuple[int, int]] = {
    Kind.CHALLENGE: (NONCE_BYTES, NONCE_BYTES),
    Kind.PROOF: (NONCE_BYTES + MAC_BYTES, NONCE_BYTES + MAC_BYTES),
    Kind.WELCOME: (MAC_BYTES, MAC_BYTES),
    Kind.READ: (1, 2 * 1024 * 1024),
    Kind.WRITE: (1, 4096),
    Kind.SUMS: (8, 8 * 4096),
    Kind.DATA: (1, DATA_BYTES_MAX),
    Kind.DONE: (COUNT.size, COUNT.size),
    Kind.ERROR: (0, 8192),
}
"""How short and how long the payload of each kind may be."""


@dataclass(frozen=True, slots=True)
class Frame:
    """A checked header."""

    kind: Kind
    length: int


def pack(kind: Kind, length: int) -> bytes:
    """Return the header of a frame."""
    return HEADER.pack(MAGIC, VERSION, kind, 0, length)


def unpack(data: bytes | bytearray | memoryview) -> Frame:
    """Check a header. Raises `InvalidArgument`, and `PayloadTooLarge` for a payload over its kind's limit."""
    magic, version, number, reserved, length = HEADER.unpack(data)
    if magic != MAGIC:
        raise InvalidArgument("this is not the bulk protocol", field="magic")
    if version != VERSION:
        raise InvalidArgument(f"bulk protocol version {version} is not spoken here, only {VERSION}", field="version")
    if number not in Kind.__members__.values():
        raise InvalidArgument(f"there is no frame of kind {number}", field="kind")
    if reserved:
        raise InvalidArgument("reserved bits are set", field="reserved")
    kind = Kind(number)
    shortest, longest = LENGTHS[kind]
    if length > longest:
        raise PayloadTooLarge(f"a {kind.name} frame has at most {longest} bytes", field="length")
    if length < shortest:
        raise InvalidArgument(f"a {kind.name} frame has at least {shortest} bytes", field="length")
    return Frame(kind, length)


def keys_of(token: Token | None) -> tuple[bytes, ...]:
    """Return the keys of proofs, ours first; without a token, a mesh has one that everybody knows."""
    return token.keys() if token is not None else (b"",)


def client_proof(key: bytes, server_nonce: bytes, client_nonce: bytes) -> bytes:
    """Return what shows a server that a client knows the mesh token."""
    return hmac.digest(key, b"covey bulk client" + server_nonce + client_nonce, "sha256")


def server_proof(key: bytes, server_nonce: bytes, client_nonce: bytes) -> bytes:
    """Return what shows a client that it reached a server of its mesh."""
    return hmac.digest(key, b"covey bulk server" + server_nonce + client_nonce, "sha256")
