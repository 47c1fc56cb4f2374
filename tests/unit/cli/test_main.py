"""The `covey` command: help at once, completion, clear errors, and no service's packages before they are needed."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import click
import pytest

from covey.cli import main as cli
from covey.errors import Unavailable

from .blocked import run_without

HEAVY = ("torch", "nats", "starlette", "uvicorn", "hnswlib", "sentence_transformers", "grpc", "numpy")
REPORT = f"import sys; print([m for m in {HEAVY!r} if m in sys.modules])"


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, **environment}
    return subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=60, check=True)


def covey(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    code = f"import sys; sys.argv = {['covey', *arguments]!r}\nfrom covey.cli.main import main\nmain()"
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_help_names_every_command() -> None:
    result = covey("--help")
    assert result.returncode == 0
    assert all(f"\n  {name} " in result.stdout for name in cli.COMMANDS)


def test_help_needs_no_service() -> None:
    code = f"""
import sys
sys.argv = ["covey", "--help"]
from covey.cli.main import main
try:
    main()
except SystemExit:
    pass
{REPORT}
"""
    assert python(code).stdout.endswith("[]\n")


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_has_a_sentence_and_an_implementation(name: str) -> None:
    module, sentence = cli.COMMANDS[name]
    assert sentence.endswith(".")
    assert isinstance(getattr(import_module(module), name), click.Command)


def test_import_is_quick_and_light() -> None:
    # Processor time, not the clock on the wall: other processes do not count.
    code = f"""
import time
began = time.process_time()
import covey
covey.Client
took = time.process_time() - began
assert took < 0.5, took
import sys
print([m for m in {HEAVY!r} if m in sys.modules and m != "grpc"])
"""
    assert python(code).stdout == "[]\n"


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_script(shell: str) -> None:
    result = covey("x", _COVEY_COMPLETE=f"{shell}_source")
    assert "covey" in result.stdout
    assert "_COVEY_COMPLETE" in result.stdout


def test_completion_offers_the_commands() -> None:
    result = covey(_COVEY_COMPLETE="bash_complete", COMP_WORDS="covey d", COMP_CWORD="1")
    assert {line.rpartition(",")[2] for line in result.stdout.split()} == {"demo", "doctor"}


def test_an_unknown_command_is_a_usage_error() -> None:
    result = covey("fly")
    assert result.returncode == 2
    assert "No such command 'fly'" in result.stderr


def test_without_a_mesh_a_command_says_how_to_start_one(tmp_path: Path) -> None:
    result = covey("chat", "hello", COVEY_HOME=str(tmp_path))
    assert result.returncode == 1
    assert result.stderr.startswith("error: no mesh runs from ")
    assert "covey up" in result.stderr
    assert "Traceback" not in result.stderr


def test_a_missing_package_names_the_extra_to_install(tmp_path: Path) -> None:
    result = run_without(
        frozenset({"matplotlib"}), tmp_path, "-c", "from covey.cli.main import main; main()", "bench", "serve"
    )
    assert result.returncode == 3
    assert "'matplotlib' is not installed: pip install 'covey[" in result.stderr
    assert "Traceback" not in result.stderr


def test_errors_of_covey_are_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def fail(**_: object) -> None:
        raise Unavailable("nobody is there: start somebody")

    monkeypatch.setattr(cli, "covey", fail)
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == cli.EXIT_FAILED
    assert capsys.readouterr().err == "error: nobody is there: start somebody\n"
