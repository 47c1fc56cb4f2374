"""`python -m services.semcache`: run the semantic cache."""

from __future__ import annotations

from covey.runtime import run_service

run_service("services.semcache")
