"""`python -m services.gateway`."""

from __future__ import annotations

from covey.runtime import run

from .config import Config
from .service import serve

raise SystemExit(run(serve, Config, name="gateway"))
