"""`python -m services.gateway`: run the gateway."""

from __future__ import annotations

from covey.runtime import run_service

run_service("services.gateway")
