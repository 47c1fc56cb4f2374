"""What every test gets: Hypothesis without wall-clock deadlines, no failpoint left armed, gRPC that stays put.

gRPC stays initialised over all tests, and out of forks: both of its habits reach into tests at random otherwise.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")  # its handlers abort children that are forked amid calls
os.environ.setdefault("TRITON_INTERPRET", "1")  # read at Triton's first import, which may come from any library

import hypothesis
import pytest
from blockbuster import blockbuster_ctx
from grpc import aio

from covey import failpoint
from covey.testing import VirtualClock
from tests.support.shared import shared_folder

pytest_plugins = ("tests.support.no_skips", "tests.support.grouping")

aio.init_grpc_aio()  # or the last call's disposal joins a thread, wherever the collector happens to run

# Shared machines make wall-clock deadlines per example flaky; the suite has its own timeout.
hypothesis.settings.register_profile("covey", deadline=None, print_blob=True)
hypothesis.settings.register_profile("soak", deadline=None, print_blob=True, max_examples=2000)
# What stands between a change and main tries the same examples every time; people and the soak look for new ones.
hypothesis.settings.register_profile("ci", deadline=None, print_blob=True, derandomize=True)
_PROFILE = "soak" if os.environ.get("COVEY_SOAK") else "ci" if os.environ.get("CI") else "covey"
hypothesis.settings.load_profile(_PROFILE)


@pytest.fixture
def clock() -> VirtualClock:
    """A clock that the test moves; inside `virtual_time` make one yourself, so that it follows the loop."""
    return VirtualClock()


@pytest.fixture(scope="session")
def packaged_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the packaged model's weights are converted once a run; tests of the conversion itself take their own."""
    return shared_folder(tmp_path_factory, "packaged-weights")


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
