"""What every other module of types stands on."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Empty:
    """No content."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ErrorDetail:
    """How an error crosses a process boundary; `code` is a key of `covey.errors.TABLE`."""

    code: str
    message: str
    field: str | None = None
    retry_after_ms: int | None = None
