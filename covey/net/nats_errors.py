"""What nats-py raises, in terms of the one error tree."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

import nats.errors
import nats.js.errors

from covey.errors import CoveyError, Fenced, InvalidArgument, NoSpace, PayloadTooLarge, Unauthenticated, Unavailable

WRONG_LAST_SEQUENCE: Final = (10071, 10164)
NO_ROOM: Final = (10023, 10047, 10077)
"""JetStream's codes: insufficient resources, storage exceeded, store failed."""


@contextmanager
def translated() -> Iterator[None]:
    """Turn what nats-py raises into the error tree."""
    try:
        yield
    except nats.js.errors.APIError as error:
        raise _api_error(error) from error
    except nats.errors.MaxPayloadError as error:
        raise PayloadTooLarge("the message is over the limit of the NATS server") from error
    except nats.errors.BadSubjectError as error:
        raise InvalidArgument("not a subject", field="subject") from error
    except (nats.errors.AuthorizationError, nats.errors.NoServersError) as error:
        raise Unauthenticated("NATS refused the connection: is the token right?", field="nats_token_file") from error
    except (nats.errors.Error, OSError, TimeoutError) as error:
        raise Unavailable(f"NATS did not answer: {type(error).__name__}", retry_after_ms=1000) from error


def _api_error(error: nats.js.errors.APIError) -> CoveyError:
    if error.err_code in WRONG_LAST_SEQUENCE:
        return Fenced("another record came first", field="expected_seq")
    if error.err_code in NO_ROOM:
        return NoSpace("the stream is full", retry_after_ms=1000)
    return Unavailable(f"JetStream refused: {error.err_code} {error.description}", retry_after_ms=1000)
