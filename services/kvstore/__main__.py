"""`python -m services.kvstore`: run a node of the KV store."""

from __future__ import annotations

from covey.runtime import run_service

run_service("services.kvstore")
