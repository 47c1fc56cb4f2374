"""Settings of a decode worker."""

from __future__ import annotations

from covey.engine.config import EngineConfig


class Config(EngineConfig, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Decode holds whole sequences, and what is retained after them."""
