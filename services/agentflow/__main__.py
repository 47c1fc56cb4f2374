"""`python -m services.agentflow`."""

from __future__ import annotations

from covey.runtime import run
from services.agentflow.config import Config
from services.agentflow.service import serve

raise SystemExit(run(serve, Config, name="agentflow"))
