"""How a client says what the cache may do for its request: in the body, or as HTTP's `Cache-Control`."""

from __future__ import annotations

from covey.errors import InvalidArgument
from covey.types.program import CacheMode

_CAN = {
    "use": (True, True),
    "bypass": (False, False),
    "no-store": (True, False),
    "no-cache": (False, True),
    "refresh": (False, True),
}
"""Whether kept answers may be read, and new ones kept."""
_MODES = {
    (True, True): CacheMode.USE,
    (False, False): CacheMode.BYPASS,
    (True, False): CacheMode.NO_STORE,
    (False, True): CacheMode.REFRESH,
}


def cache_controls(wish: str, max_age_s: float, header: str) -> tuple[CacheMode, float]:
    """Combine the body's `cache` and `cache_max_age_s` with the header: what either forbids is forbidden.

    Of two ages the lower one counts; 0 is no limit, but `max-age=0` in the header, as in HTTP, reads nothing. Other
    directives are ignored, as HTTP demands. Raises `InvalidArgument` for a `max-age` that is no number of seconds.
    """
    can_read, can_fill = _CAN[wish]
    for directive in header.lower().split(","):
        name, _, value = (part.strip() for part in directive.partition("="))
        if name in ("no-cache", "no-store", "bypass"):
            read, fill = _CAN[name]
            can_read, can_fill = can_read and read, can_fill and fill
        elif name == "max-age":
            if not value.isdecimal() or len(value) > 12:
                raise InvalidArgument("max-age is a whole number of seconds", field="cache-control")
            can_read = can_read and int(value) > 0
            max_age_s = min(max_age_s or float(value), float(value))
    return _MODES[can_read, can_fill], max_age_s
