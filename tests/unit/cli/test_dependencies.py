"""`pip install covey` alone is enough for the SDK and the client commands."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import covey
from covey.cli.doctor import PACKAGES

from .blocked import beyond_core, run_without

ALL_OF_THE_SDK = "import covey; print(sorted(n for n in covey.__all__ if getattr(covey, n) is None))"


def test_the_blocked_set_holds_what_services_need() -> None:
    assert {*PACKAGES, "prometheus_client", "structlog", "xxhash", "uvicorn", "numpy"} <= beyond_core()
    assert not {"grpc", "google", "anyio", "click", "httpx", "msgspec", "rich"} & beyond_core()


def test_the_whole_sdk_imports(tmp_path: Path) -> None:
    result = run_without(beyond_core(), tmp_path, "-c", ALL_OF_THE_SDK)
    assert result.stderr == ""
    assert result.stdout == "[]\n"


def test_commands_import(tmp_path: Path) -> None:
    names = ", ".join(f"covey.cli.{name}" for name in ("main", "chat", "run", "doctor", "up", "demo"))
    result = run_without(beyond_core(), tmp_path, "-c", f"import {names}")
    assert result.stderr == ""


def test_doctor_says_what_to_install(tmp_path: Path) -> None:
    code = "from covey.cli.doctor import doctor; doctor()"
    result = run_without(beyond_core(), tmp_path, "-c", code)
    assert result.returncode == 3
    assert all(f"pip install 'covey[{extra}]'" in result.stdout for extra in PACKAGES.values())


def test_a_client_opens_its_channels(tmp_path: Path) -> None:
    code = """
import anyio, covey

async def main():
    async with covey.Client.connect(gateway="127.0.0.1:9", flow="127.0.0.1:9", api_key="ck-0123456789abcdef") as client:
        try:
            await client.models()
        except covey.CoveyError as error:
            print(error.code)

anyio.run(main)
"""
    result = run_without(beyond_core(), tmp_path, "-c", code)
    assert result.stderr == ""
    assert result.stdout == "UNAVAILABLE\n"


def test_every_public_name_is_listed_for_type_checkers() -> None:
    assert covey.__file__ is not None
    (checked,) = [node for node in ast.parse(Path(covey.__file__).read_text()).body if isinstance(node, ast.If)]
    listed = {alias.name for node in checked.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert listed == set(covey.__all__) - {"__version__"}


@pytest.mark.parametrize(
    ("role", "package"), [("gateway", "starlette"), ("semcache", "hnswlib"), ("kvstore", "xxhash"), ("decode", "torch")]
)
def test_a_service_without_a_package_exits_3_and_names_its_extra(role: str, package: str, tmp_path: Path) -> None:
    """Torch is looked for when the model is loaded, which needs NATS: there the settings alone must be enough."""
    flags = ("--check",) if package == "torch" else ()
    result = run_without(frozenset({package}), tmp_path, "-P", "-m", f"services.{role}", *flags)
    if package == "torch":
        assert result.returncode == 0, result.stderr
    else:
        assert result.returncode == 3, result.stderr
        assert f"pip install 'covey[{role}]'" in result.stderr
