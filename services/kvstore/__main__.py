"""`python -m services.kvstore`: run a node of the KV store."""

from __future__ import annotations

from covey.runtime import run

from .config import Config
from .service import serve

raise SystemExit(run(serve, Config, name="kvstore"))
