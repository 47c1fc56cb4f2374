"""Declared bounds of message fields: written beside the field, enforced by the codec on every decode."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

KEY = "limit"


@dataclass(frozen=True, slots=True, kw_only=True)
class Limit:
    """Bounds of one field: `low ≤ value ≤ high` for numbers, at most `size` items, characters or bytes."""

    low: float | None = None
    high: float | None = None
    size: int | None = None


def bounded(*, low: float | None = None, high: float | None = None, size: int | None = None, **kwargs: Any) -> Any:
    """Declare a dataclass field with bounds; other arguments go to `dataclasses.field`."""
    return field(metadata={KEY: Limit(low=low, high=high, size=size)}, **kwargs)
