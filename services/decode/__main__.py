"""`python -m services.decode`: run a decode worker."""

from __future__ import annotations

import os

from covey.model.share import thread_environment

for name, value in thread_environment().items():
    os.environ.setdefault(name, value)  # before anything imports torch, which reads them once

from covey.runtime import run  # noqa: E402

from .config import Config  # noqa: E402
from .service import serve  # noqa: E402

raise SystemExit(run(serve, Config, name="decode"))
