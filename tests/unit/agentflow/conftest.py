"""Starting NATS blocks, as a launcher may; agentflow must not."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from blockbuster import blockbuster_ctx


@pytest.fixture(autouse=True)
def _no_blocking() -> Iterator[None]:
    excluded = ["covey.testing", "covey.net.embedded"]
    with blockbuster_ctx(scanned_modules=["covey", "services"], excluded_modules=excluded):
        yield
