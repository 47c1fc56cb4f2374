"""gRPC stays initialised over all tests, and out of forks: both of its habits reach into tests at random otherwise."""

from __future__ import annotations

import os

os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")  # its handlers abort children that are forked amid calls

from grpc import aio

aio.init_grpc_aio()  # or the last call's disposal joins a thread, wherever the collector happens to run
