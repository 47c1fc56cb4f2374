"""`python -m services.agentflow`: run the workflow service."""

from __future__ import annotations

from covey.runtime import run_service

run_service("services.agentflow")
