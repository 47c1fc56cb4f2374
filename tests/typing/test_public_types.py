"""The public API as mypy sees it: a right program passes, and every wrong use is refused."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
MARK = re.compile(r"# E: ([a-z-]+)$")
ERROR = re.compile(r"^(?P<file>[^:]+):(?P<line>\d+): error: .*\[(?P<code>[a-z-]+)\]$")

pytestmark = pytest.mark.timeout(300)


def test_right_uses_pass_and_wrong_ones_are_refused(tmp_path: Path) -> None:
    wrong = tmp_path / "wrong_uses.py"
    source = (HERE / "wrong_uses.txt").read_text()
    wrong.write_text(source)
    command = [sys.executable, "-m", "mypy", "--strict", "--no-error-summary", "--no-color-output", "--no-pretty"]
    done = subprocess.run(
        [*command, str(HERE / "sdk_program.py"), str(wrong)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    found: dict[tuple[str, int], set[str]] = {}
    for line in done.stdout.splitlines():
        match = ERROR.match(line)
        if match:
            found.setdefault((Path(match["file"]).name, int(match["line"])), set()).add(match["code"])
    marks = {i: m[1] for i, text in enumerate(source.splitlines(), start=1) if (m := MARK.search(text))}
    assert len(marks) > 20
    refused = {line for (name, line), codes in found.items() if name == wrong.name and marks.get(line) in codes}
    accepted = [source.splitlines()[i - 1].strip() for i in marks if i not in refused]
    assert not accepted, f"mypy accepts, or refuses for another reason: {accepted}\n{done.stdout}"
    unexpected = [place for place in found if place[0] != wrong.name or place[1] not in marks]
    assert not unexpected, f"mypy refuses what is right: {unexpected}\n{done.stdout}{done.stderr}"
