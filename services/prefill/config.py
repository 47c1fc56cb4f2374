"""Settings of a prefill worker."""

from __future__ import annotations

from covey.engine.config import EngineConfig


class Config(EngineConfig, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Prefill holds prompts only, and only until they are handed over."""

    max_running: int = 16
