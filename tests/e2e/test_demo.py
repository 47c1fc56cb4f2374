"""The commands as a person types them: the demo alone, then chat and programs of one's own beside `covey up`."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from itertools import takewhile
from pathlib import Path

import pytest

from tests.support.tiny_llama import write_tiny_llama

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(180)]

COMMAND_S = 120
EXAMPLES = Path(__file__).parents[2] / "examples"
ROWS = (
    "prompt tokens",
    "output tokens",
    "blocks moved",
    "prompt tokens from a prefix cache",
    "blocks pinned during tools",
    "answers from semcache",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo")
    write_tiny_llama(folder / "model")
    return folder


def _environment(folder: Path) -> dict[str, str]:
    return {**os.environ, "COVEY_HOME": str(folder / "home"), "COLUMNS": "120", "NO_COLOR": "1"}


def _covey(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "covey", *arguments],
        capture_output=True,
        text=True,
        env=_environment(folder),
        timeout=COMMAND_S,
        check=False,
    )


def test_the_demo_ends_well_and_says_what_it_cost(folder: Path) -> None:
    done = _covey(folder, "demo", "--model", f"tiny={folder / 'model'}")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Every step ended well." in done.stdout
    table = done.stdout[done.stdout.index("what it cost") :]
    cells = {row: _cells(table, row) for row in ROWS}
    assert all(len(values) == 3 for values in cells.values()), table
    _, first, second = cells["answers from semcache"]
    assert first == 0
    assert second > 0
    assert cells["blocks pinned during tools"][1] > 0
    assert cells["prompt tokens from a prefix cache"][1] > 0
    assert cells["output tokens"][1] == cells["output tokens"][2]


def _cells(table: str, row: str) -> list[int]:
    """The figures of one row: chat, first run, second run."""
    for line in table.splitlines():
        name, *cells = [cell.strip() for cell in line.strip(" │┃").replace("┃", "│").split("│")]
        if name == row:
            return [int(cell) for cell in cells]
    raise AssertionError(f"no row {row!r} in\n{table}")


@pytest.fixture(scope="module")
def up(folder: Path) -> Iterator[Path]:
    """A `covey up` that runs from `folder`; yields its run directory."""
    run_dir = folder / "run"
    flags = ["--json", "--port", "0", "--run-dir", str(run_dir), "--model", f"tiny={folder / 'model'}"]
    with subprocess.Popen(
        [sys.executable, "-m", "covey", "up", *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=_environment(folder),
    ) as process:
        try:
            assert process.stdout is not None
            said = list(takewhile(lambda line: '"endpoints"' not in line, process.stdout))
            assert process.poll() is None, "".join(said)
            yield run_dir
        finally:
            process.send_signal(signal.SIGINT)
            process.communicate(timeout=60)
    assert process.returncode == 0


def test_chat_prints_the_chunks_of_an_answer(folder: Path, up: Path) -> None:
    done = _covey(folder, "chat", "--json", "--max-tokens", "8", "--run-dir", str(up), "hi")
    assert done.returncode == 0, done.stderr
    chunks = [json.loads(line) for line in done.stdout.splitlines() if line.strip()]
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert chunks[-1]["usage"]["completion_tokens"] <= 8


@pytest.mark.parametrize(
    ("example", "said"),
    [("chat.py", "tokens in"), ("semantic_functions.py", "<- "), ("workflow_with_tool.py", "run: SUCCEEDED")],
)
def test_an_example_runs(folder: Path, up: Path, example: str, said: str) -> None:
    done = _covey(folder, "run", "--run-dir", str(up), str(EXAMPLES / example))
    assert done.returncode == 0, done.stdout + done.stderr
    assert said in done.stdout


def test_without_a_mesh_chat_says_what_to_do(folder: Path) -> None:
    done = _covey(folder, "chat", "--run-dir", str(folder / "nowhere"), "hi")
    assert done.returncode != 0
    assert "covey up" in done.stderr
