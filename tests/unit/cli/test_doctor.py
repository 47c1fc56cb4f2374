"""`covey doctor`: each finding says what to do, and the exit code says whether there is something."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from covey.cli import doctor


@pytest.fixture(autouse=True)
def _own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COVEY_HOME", str(tmp_path))


def test_json_lists_every_check_with_what_was_found() -> None:
    result = CliRunner().invoke(doctor.doctor, ["--json"])
    findings = json.loads(result.output)

    assert {"Python", "memory", "disk", "shared memory", "NATS server", "packaged model"} <= {
        finding["check"] for finding in findings
    }
    assert all(finding["found"] and finding["mend"] for finding in findings)
    assert result.exit_code == (0 if all(finding["well"] for finding in findings) else 3)


def test_a_missing_package_names_its_extra_and_the_exit_code_is_3(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "find_spec", lambda name: None if name == "hnswlib" else object())
    result = CliRunner().invoke(doctor.doctor, [])

    assert result.exit_code == 3
    lines = result.output.splitlines()
    at = next(i for i, line in enumerate(lines) if "package hnswlib" in line)
    assert lines[at].startswith("missing")
    assert "pip install 'covey[semcache]'" in lines[at + 1]


def test_every_extra_that_it_names_exists() -> None:
    from importlib.metadata import metadata

    extras = metadata("covey").get_all("Provides-Extra") or []
    assert set(doctor.PACKAGES.values()) <= set(extras)
