"""`covey.toml` and `docs/config.md` are what the generator prints, and the sample says the defaults."""

from __future__ import annotations

import re
import tomllib
from importlib import import_module
from pathlib import Path
from typing import Any

import msgspec
import pytest

from covey.config import TABLES, load
from tools import sample_config

ROOT = Path(__file__).parents[3]
SETTING = re.compile(r"^#(?=\[\[?[a-z.]+\]|[a-z_]+ = [^<])", re.MULTILINE)


def default_of(service: str) -> msgspec.Struct:
    config: type[msgspec.Struct] = import_module(f"services.{service}.config").Config
    return config()


def uncommented(text: str) -> str:
    """The sample with every setting in force; tables that stand for one of many (`NAME`) are left out."""
    tables = [part for part in text.split("\n\n") if f"{sample_config.PLACEHOLDER}]\n" not in part]
    return SETTING.sub("", "\n\n".join(tables))


def loaded(service: str, file: Path) -> Any:
    cls = type(default_of(service))
    return load(cls, file=file, tables=("common", service)).config


def test_the_committed_files_are_what_the_generator_prints() -> None:
    assert (ROOT / sample_config.SAMPLE).read_text() == sample_config.sample()
    assert (ROOT / sample_config.REFERENCE).read_text() == sample_config.reference()


@pytest.mark.parametrize("service", sample_config.SERVICES)
def test_the_sample_changes_nothing_as_it_is(service: str) -> None:
    assert loaded(service, ROOT / sample_config.SAMPLE) == default_of(service)


@pytest.mark.parametrize("service", sample_config.SERVICES)
def test_the_sample_says_the_defaults(service: str, tmp_path: Path) -> None:
    text = uncommented(sample_config.sample())
    file = tmp_path / "covey.toml"
    file.write_text(text)

    assert loaded(service, file) == default_of(service)
    # The settings above were in force, not comments: a changed one arrives.
    assert tomllib.loads(text)[service]
    file.write_text(text.replace("drain_s = 20.0", "drain_s = 21.0"))
    assert loaded(service, file).drain_s == 21.0


def test_every_setting_of_every_service_is_in_the_sample() -> None:
    listed = {(table.name, setting.name) for table in sample_config.tables() for setting in table.settings}
    common = {name for table, name in listed if table == "common"}
    for service in sample_config.SERVICES:
        for path in leaves(default_of(service), service):
            table, _, name = path.rpartition(".")
            assert (table, name) in listed or (table == service and name in common), path


def leaves(value: msgspec.Struct, path: str) -> list[str]:
    """Dotted paths of a struct's plain settings; tables of many entries are covered by their own headers."""
    found = []
    for name in value.__struct_fields__:
        inner = getattr(value, name)
        if isinstance(inner, msgspec.Struct):
            found += leaves(inner, f"{path}.{name}")
        elif name not in ("models", "tenants", "categories"):
            found.append(f"{path}.{name}")
    return found


def test_tables_in_the_sample_are_those_a_file_may_hold() -> None:
    headers = re.findall(r"^#?\[\[?([a-z]+)", sample_config.sample(), re.MULTILINE)
    assert set(headers) == set(TABLES)


def test_check_mode_says_which_file_is_stale(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "docs").mkdir()
    assert sample_config.main([]) == 0
    assert sample_config.main(["--check"]) == 0
    (tmp_path / "covey.toml").write_text("[decode]\n")
    assert sample_config.main(["--check"]) == 1
    assert "covey.toml is not up to date" in capsys.readouterr().out
