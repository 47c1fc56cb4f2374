"""`python -m services.gateway`: run the gateway."""

from __future__ import annotations

from covey.runtime import run_service

raise SystemExit(run_service("services.gateway"))
