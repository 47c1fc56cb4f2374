"""`covey cache` against a real cache over real sockets, and what it says when something is amiss."""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anyio
import anyio.from_thread
import pytest
from click.testing import CliRunner

from covey.cli.cache import cache
from covey.cli.state import write_endpoints
from covey.client.endpoints import Endpoints
from covey.errors import CoveyError
from covey.net.rpc import serve
from covey.testing import VirtualClock
from tests.support.semcache import ACME, offer, query, running_cache


@pytest.fixture(autouse=True)
def _no_blocking() -> None:
    """Off: commands run their own loop."""


@pytest.fixture
def run_dir(tmp_path: Path) -> Iterator[Path]:
    """The files of a mesh whose semcache holds two entries."""

    async def hold(*, task_status: Any) -> None:
        async with running_cache(VirtualClock()) as parts:
            await parts.desk.offer(offer(query("the opening hours", exact=b"1"), "at nine"), timeout_s=5.0)
            await parts.desk.offer(offer(query("cancel my card", exact=b"2", category="code")), timeout_s=5.0)
            async with serve("127.0.0.1:0", parts.servicer.handlers()) as server:
                task_status.started(server.address)
                await anyio.sleep_forever()

    with anyio.from_thread.start_blocking_portal() as portal:
        future, address = portal.start_task(hold)
        endpoints = Endpoints(pid=os.getpid(), http="", grpc="", flow="", api_key_file="", models=[], semcache=address)
        write_endpoints(tmp_path, endpoints)
        yield tmp_path
        future.cancel()


def covey(run_dir: Path, *words: str, text: str | None = None) -> str:
    done = CliRunner().invoke(cache, [*words, "--run-dir", str(run_dir)], input=text, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


def test_every_command_in_turn(run_dir: Path) -> None:
    assert "2 entries" in covey(run_dir, "stats")
    assert json.loads(covey(run_dir, "stats", "--json"))["entries"] == 2
    context = base64.b64encode(b"system").decode()
    words = ("explain", "the opening hours today", "--tenant", ACME, "--model", "tiny", "--category", "faq")
    assert "under the threshold" in covey(run_dir, *words, "--context", context)
    dry = json.loads(covey(run_dir, "invalidate", "--tenant", ACME, "--category", "code", "--dry-run", "--json"))
    assert dry == {"removed": 1, "epoch": 0}
    lines = covey(run_dir, "export", "--tenant", ACME).splitlines()
    assert len(lines) == 2
    assert "2 entries gone" in covey(run_dir, "invalidate", "--tenant", ACME, "--all")
    assert "2 entries stored" in covey(run_dir, "warm", "-", text="\n".join(lines))
    assert "1 entries would go" in covey(run_dir, "invalidate", "--tenant", ACME, "--category", "faq", "--dry-run")


def test_errors_say_what_to_do(run_dir: Path, tmp_path: Path) -> None:
    for words, hint in (
        (("invalidate", "--tenant", ACME), "--all"),
        (("invalidate", "--similar-to", "x"), "similarity"),
        (("explain", "x", "--model", "m", "--context", "z"), "base64"),
        (("explain", "x", "--model", "m", "--category", "nope"), "known are"),
    ):
        with pytest.raises(CoveyError, match=hint):
            covey(run_dir, *words)
    with pytest.raises(CoveyError, match="line 2 is no record"):
        covey(run_dir, "warm", "-", text="\n{}\n")
    with pytest.raises(CoveyError, match="covey up"):
        covey(tmp_path / "nowhere", "stats")
