"""The public names of `covey`: all there, loaded late, light."""

from __future__ import annotations

import subprocess
import sys

import covey


def test_every_public_name_is_there() -> None:
    assert set(covey.__all__) == set(covey._MODULES) | {"__version__"}
    assert all(getattr(covey, name) is not None for name in covey.__all__)


def test_importing_covey_is_cheap_and_the_sdk_needs_neither_torch_nor_nats() -> None:
    script = (
        "import time; began = time.perf_counter(); import covey; took_s = time.perf_counter() - began\n"
        "import sys; assert 'grpc' not in sys.modules, 'loaded before it is used'\n"
        "[getattr(covey, name) for name in covey.__all__]\n"
        "assert not {'torch', 'nats', 'numpy', 'structlog', 'prometheus_client'} & set(sys.modules)\n"
        "print(took_s)"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert float(run.stdout) < 0.15
