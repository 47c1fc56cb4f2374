"""The files of a mesh: what is generated, what the user's file wins, and that secrets stay and stay private."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import pytest

from covey.cli.files import MeshFiles
from covey.config import load
from covey.errors import InvalidArgument
from services.decode.config import Config as DecodeConfig
from services.gateway.config import Config as GatewayConfig


def written(folder: Path, users: str | None = None) -> tuple[MeshFiles, dict[str, Any]]:
    base = None
    if users is not None:
        base = folder / "covey.toml"
        base.write_text(users)
    files = MeshFiles(run_dir=folder / "run", cache_dir=folder / "cache", base=base)
    files.write(
        nats_url="nats://127.0.0.1:5",
        nats_token_file=folder / "nats.token",
        models={"smollm2": "smollm2"},
        remotes={"big": "https://host.example/v1"},
    )
    return files, tomllib.loads(files.config.read_text())


def test_what_is_written_is_what_services_take(tmp_path: Path) -> None:
    files, _ = written(tmp_path)
    gateway = load(GatewayConfig, file=files.config, tables=("common", "gateway")).config
    decode = load(DecodeConfig, file=files.config, tables=("common", "decode")).config

    assert gateway.nats == decode.nats == "nats://127.0.0.1:5"
    assert [(m.name, m.source, m.url) for m in gateway.models] == [
        ("smollm2", "smollm2", ""),
        ("big", "", "https://host.example/v1"),
    ]
    assert gateway.tenants["local"].key_file == str(files.api_key_file)
    assert decode.cache_dir == str(tmp_path / "cache")


def test_the_users_file_wins_key_by_key(tmp_path: Path) -> None:
    users = '[common]\nlog_level = "debug"\n[decode]\nkv_blocks = 7\n[tenants.acme]\nkey_file = "acme.key"\n'
    _, table = written(tmp_path, users)

    assert table["common"]["log_level"] == "debug"
    assert table["common"]["nats"] == "nats://127.0.0.1:5"
    assert table["decode"] == {"cache_dir": str(tmp_path / "cache"), "kv_blocks": 7}
    assert set(table["tenants"]) == {"local", "acme"}


def test_what_is_no_table_replaces_what_was_generated(tmp_path: Path) -> None:
    _, table = written(tmp_path, '[[gateway.models]]\nname = "other"\nsource = "smollm2"\n')
    assert [model["name"] for model in table["gateway"]["models"]] == ["other"]


def test_a_broken_file_of_the_users_is_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match=r"covey\.toml is not valid TOML") as caught:
        written(tmp_path, "[common\n")
    assert caught.value.field == "config"


def test_everything_is_private(tmp_path: Path) -> None:
    files, table = written(tmp_path)
    secrets = [
        table["common"]["mesh_token_file"],
        table["gateway"]["mesh_secret_file"],
        table["tenants"]["local"]["key_file"],
    ]
    assert [Path(path).stat().st_mode & 0o777 for path in (*secrets, files.config)] == [0o600] * 4
    assert [path.stat().st_mode & 0o777 for path in (files.run_dir, files.log("x").parent)] == [0o700] * 2
    assert len({Path(path).read_text() for path in secrets}) == 3
    assert files.api_key_file.read_text().startswith("ck-")


def test_secrets_are_kept_over_restarts_and_the_configuration_is_not(tmp_path: Path) -> None:
    files, _ = written(tmp_path, "[decode]\nkv_blocks = 7\n")
    secrets = {path.name: path.read_text() for path in files.run_dir.glob("*.*") if path.suffix != ".toml"}
    _, table = written(tmp_path, "[decode]\nkv_blocks = 8\n")

    assert len(secrets) == 3
    assert {name: (files.run_dir / name).read_text() for name in secrets} == secrets
    assert table["decode"]["kv_blocks"] == 8
