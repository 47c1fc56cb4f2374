"""The one error tree of Covey and its table: code, gRPC status, HTTP status, retryable.

CoveyError
├── InvalidArgument        a field of the request is wrong; names the field
│   └── ContextLengthExceeded
├── PayloadTooLarge        the body or message is over its limit
├── Unauthenticated        no or a wrong credential
├── PermissionDenied       the credential is right, the action is not allowed
├── NotFound               no such model, program, run, lease or block
│   └── Miss               a KV block is not there (an answer, not a fault)
├── AlreadyExists          same id, different content
├── FailedPrecondition     the state does not allow it
│   ├── Fenced             an older epoch tried to write
│   ├── LeaseExpired       the lease ended before the read did
│   ├── LayoutMismatch     blocks of another layout, precision or model
│   └── VersionMismatch    protocol or schema out of range
├── DataCorrupt            a checksum does not fit
├── Overloaded             try again after `retry_after_ms`
│   ├── QuotaExceeded      the tenant's own limit
│   └── NoSpace            a store is full
├── Pending                another writer is at it; wait on it
├── Unavailable            the service or worker is gone or draining
├── DeadlineExceeded       the time ran out
├── Cancelled              the caller went away
├── Unimplemented          a known but unsupported method or field
└── Internal               a fault of ours; carries only a reference
"""

from __future__ import annotations

from typing import ClassVar


class CoveyError(Exception):
    """An error that may cross a process boundary: says what is wrong, where, and what to do.

    `message` never holds prompt text, secrets or internals. `field` is the path of the offending
    field in the caller's own terms. `retry_after_ms` is a hint for retryable errors.
    """

    code: ClassVar[str] = "INTERNAL"
    grpc: ClassVar[str] = "INTERNAL"
    http: ClassVar[int] = 500
    retryable: ClassVar[bool] = False

    def __init__(self, message: str, *, field: str | None = None, retry_after_ms: int | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.field = field
        self.retry_after_ms = retry_after_ms


class InvalidArgument(CoveyError):
    code, grpc, http = "INVALID_ARGUMENT", "INVALID_ARGUMENT", 400


class ContextLengthExceeded(InvalidArgument):
    code = "CONTEXT_LENGTH_EXCEEDED"


class PayloadTooLarge(CoveyError):
    code, grpc, http = "PAYLOAD_TOO_LARGE", "RESOURCE_EXHAUSTED", 413


class Unauthenticated(CoveyError):
    code, grpc, http = "UNAUTHENTICATED", "UNAUTHENTICATED", 401


class PermissionDenied(CoveyError):
    code, grpc, http = "PERMISSION_DENIED", "PERMISSION_DENIED", 403


class NotFound(CoveyError):
    code, grpc, http = "NOT_FOUND", "NOT_FOUND", 404


class Miss(NotFound):
    code = "MISS"


class AlreadyExists(CoveyError):
    code, grpc, http = "ALREADY_EXISTS", "ALREADY_EXISTS", 409


class FailedPrecondition(CoveyError):
    code, grpc, http = "FAILED_PRECONDITION", "FAILED_PRECONDITION", 409


class Fenced(FailedPrecondition):
    code = "FENCED"


class LeaseExpired(FailedPrecondition):
    code = "LEASE_EXPIRED"


class LayoutMismatch(FailedPrecondition):
    code = "LAYOUT_MISMATCH"


class VersionMismatch(FailedPrecondition):
    code = "VERSION"


class DataCorrupt(CoveyError):
    code, grpc, http = "CHECKSUM", "DATA_LOSS", 500


class Overloaded(CoveyError):
    code, grpc, http, retryable = "OVERLOADED", "RESOURCE_EXHAUSTED", 503, True


class QuotaExceeded(Overloaded):
    code, http = "QUOTA", 429


class NoSpace(Overloaded):
    code, http = "NO_SPACE", 503


class Pending(CoveyError):
    code, grpc, http, retryable = "PENDING", "ABORTED", 409, True


class Unavailable(CoveyError):
    code, grpc, http, retryable = "UNAVAILABLE", "UNAVAILABLE", 503, True


class DeadlineExceeded(CoveyError):
    code, grpc, http = "DEADLINE_EXCEEDED", "DEADLINE_EXCEEDED", 504


class Cancelled(CoveyError):
    code, grpc, http = "CANCELLED", "CANCELLED", 499


class Unimplemented(CoveyError):
    code, grpc, http = "UNIMPLEMENTED", "UNIMPLEMENTED", 501


class Internal(CoveyError):
    code, grpc, http = "INTERNAL", "INTERNAL", 500


def _tree(cls: type[CoveyError]) -> dict[str, type[CoveyError]]:
    found = {cls.code: cls} if cls is not CoveyError else {}
    for sub in cls.__subclasses__():
        if sub.__module__ == __name__:
            found.update(_tree(sub))
    return found


TABLE: dict[str, type[CoveyError]] = _tree(CoveyError)
"""Every code and its class; the proto enum `ErrorCode` and `docs/errors.md` are held equal to it by a test."""


def from_code(code: str, message: str, *, field: str | None = None, retry_after_ms: int | None = None) -> CoveyError:
    """Rebuild the error that another process sent; an unknown code becomes `Internal`."""
    return TABLE.get(code, Internal)(message, field=field, retry_after_ms=retry_after_ms)
