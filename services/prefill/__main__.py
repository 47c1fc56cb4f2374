"""`python -m services.prefill`: run a prefill worker."""

from __future__ import annotations

import os

from covey.model.share import thread_environment
from covey.runtime import run_service

for name, value in thread_environment().items():
    os.environ.setdefault(name, value)  # before anything imports torch, which reads them once

run_service("services.prefill")
