"""What every test gets: Hypothesis without wall-clock deadlines, and no failpoint left armed."""

from __future__ import annotations

from collections.abc import Iterator

import hypothesis
import pytest
from blockbuster import blockbuster_ctx

from covey import failpoint
from covey.testing import VirtualClock

# Shared machines make wall-clock deadlines per example flaky; the suite has its own timeout.
hypothesis.settings.register_profile("covey", deadline=None, print_blob=True)
hypothesis.settings.load_profile("covey")


@pytest.fixture
def clock() -> VirtualClock:
    """A clock that the test moves; inside `virtual_time` make one yourself, so that it follows the loop."""
    return VirtualClock()


@pytest.fixture(autouse=True)
def _disarmed() -> Iterator[None]:
    yield
    failpoint.disarm()


@pytest.fixture(autouse=True)
def _no_blocking() -> Iterator[None]:
    """Fail a test in which our code makes a blocking call on the event loop.

    Tests themselves may, and so may the command line: its loop serves nobody.
    """
    with blockbuster_ctx(scanned_modules=["covey", "services"], excluded_modules=["covey.testing", "covey.cli"]):
        yield
