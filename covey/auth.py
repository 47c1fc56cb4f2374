"""Who is calling: API keys of tenants at the edge, one mesh token inside, and the tenant's hash-chain root."""

from __future__ import annotations

import hmac
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from hashlib import blake2b

from covey.errors import InvalidArgument, PermissionDenied, Unauthenticated
from covey.types.ids import TenantId

SECRET_CHARS_MIN = 16
API_KEY_PREFIX = "ck-"
CHAIN_ROOT_BYTES = 16
CREDENTIAL_CHARS_MAX = 1024


class Scope(StrEnum):
    """What a key may do."""

    INFERENCE = "inference"
    ADMIN = "admin"
    """Erase tenants, read every tenant's state, drain workers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Principal:
    """An authenticated caller."""

    tenant: TenantId
    scopes: frozenset[Scope] = frozenset({Scope.INFERENCE})

    def require(self, scope: Scope) -> None:
        """Raise `PermissionDenied` unless the caller's key has `scope`."""
        if scope not in self.scopes:
            raise PermissionDenied(f"this key lacks the scope {scope.value}")


class ApiKeys:
    """Finds the principal of an API key; keeps only digests of keys.

    Every look-up compares against all keys in constant time, and every failure (no header, malformed, unknown)
    is the same error after the same work, so neither text nor time tells a guesser how close it came.
    """

    def __init__(self, key_files: Mapping[TenantId, str]) -> None:
        """Read each tenant's key file, given as text: one `KEY [SCOPE,…]` a line, `#` starts a comment.

        Several keys a tenant allow rotation. Without scopes a key has `inference`.

        Raises:
            InvalidArgument: a key is too short, has an unknown scope, or belongs to two tenants.
        """
        self._principals: dict[bytes, Principal] = {}
        for tenant, text in key_files.items():
            for key, scopes in _lines(text):
                digest = _digest(_checked(key, f"tenants.{tenant}.key_file"))
                if digest in self._principals:
                    raise InvalidArgument(f"a key of tenant {tenant} is used twice", field=f"tenants.{tenant}.key_file")
                self._principals[digest] = Principal(tenant=tenant, scopes=_scopes(scopes, tenant))

    def authenticate(self, authorization: str | None) -> Principal:
        """Return who sends this `Authorization` header. Raises `Unauthenticated`, always with the same words."""
        presented = _digest(_credential(authorization))
        found: Principal | None = None
        for digest, principal in self._principals.items():  # no early exit: time must not depend on the key
            if hmac.compare_digest(digest, presented):
                found = principal
        if found is None:
            raise Unauthenticated("the API key is missing or wrong: send `Authorization: Bearer <key>`")
        return found


class MeshToken:
    """The shared token of internal calls; several lines allow rotation: the first is sent, all are accepted."""

    __slots__ = ("_accepted", "_sent")

    def __init__(self, text: str) -> None:
        """Take the content of the token file. Raises `InvalidArgument` when a token is too short."""
        tokens = [_checked(token, "mesh_token_file") for token, _ in _lines(text)]
        if not tokens:
            raise InvalidArgument("the mesh token file is empty", field="mesh_token_file")
        self._sent = tokens[0]
        self._accepted = tuple(_digest(token) for token in tokens)

    def bearer(self) -> str:
        """Return the `authorization` header of an internal call."""
        return f"Bearer {self._sent}"

    def keys(self) -> tuple[bytes, ...]:
        """Return what proofs are made with where the token itself must not travel: the first is ours, all count."""
        return self._accepted

    def matches(self, credential: str) -> bool:
        """Compare what came after `Bearer`, in constant time."""
        presented = _digest(credential)
        matched = False
        for digest in self._accepted:
            matched |= hmac.compare_digest(digest, presented)
        return matched

    def __repr__(self) -> str:
        return "MeshToken(***)"


def chain_root(mesh_secret: bytes, tenant: TenantId) -> bytes:
    """Derive a tenant's hash-chain root, 16 bytes: keyed BLAKE2b, so no tenant can compute another's (design §7).

    Raises `InvalidArgument` when the secret is shorter than 16 bytes.
    """
    if len(mesh_secret) < SECRET_CHARS_MIN:
        raise InvalidArgument(f"the mesh secret needs at least {SECRET_CHARS_MIN} bytes", field="mesh_secret_file")
    key = mesh_secret if len(mesh_secret) <= blake2b.MAX_KEY_SIZE else blake2b(mesh_secret).digest()
    return blake2b(tenant.encode(), key=key, digest_size=CHAIN_ROOT_BYTES, person=b"covey-root").digest()


def new_secret() -> str:
    """Make a secret of 256 bits, as text that fits a header, a URL and a shell word."""
    return secrets.token_urlsafe(32)


def new_api_key() -> str:
    """Make an API key; its prefix lets secret scanners find leaked ones."""
    return API_KEY_PREFIX + new_secret()


def _credential(authorization: str | None) -> str:
    scheme, _, credential = (authorization or "").strip().partition(" ")
    usable = scheme.lower() == "bearer" and len(credential) <= CREDENTIAL_CHARS_MAX
    return credential.strip() if usable else ""  # the empty key is nobody's, and is compared like any other


def _digest(credential: str) -> bytes:
    return blake2b(credential.encode(errors="surrogatepass"), digest_size=32).digest()


def _lines(text: str) -> list[tuple[str, str]]:
    words = (line.partition("#")[0].split(maxsplit=1) for line in text.splitlines())
    return [(line[0], line[1] if len(line) > 1 else "") for line in words if line]


def _checked(secret: str, field: str) -> str:
    if not SECRET_CHARS_MIN <= len(secret) <= CREDENTIAL_CHARS_MAX:
        raise InvalidArgument(f"a secret needs {SECRET_CHARS_MIN} to {CREDENTIAL_CHARS_MAX} characters", field=field)
    return secret


def _scopes(text: str, tenant: str) -> frozenset[Scope]:
    try:
        named = frozenset(Scope(name.strip()) for name in text.split(",") if name.strip())
    except ValueError as error:
        known = ", ".join(scope.value for scope in Scope)
        raise InvalidArgument(f"unknown scope; known are {known}", field=f"tenants.{tenant}.key_file") from error
    return named or frozenset({Scope.INFERENCE})
