"""Configuration: every value from the layer that should win, every mistake named with its path and source."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from covey.config import CommonConfig, ConfigError, Loaded, PositiveInt, TenantConfig, load, render
from covey.errors import InvalidArgument
from covey.secretfile import SECRET_BYTES_MAX, read_secret, write_secret


class EngineConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    max_tokens: PositiveInt = 2048
    devices: list[str] = msgspec.field(default_factory=list)
    step_s: float = 0.1
    warm: bool = True
    draft: str | None = None
    seed: int | None = None


class Peer(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    host: str
    port: int = 1


class DecodeConfig(CommonConfig, frozen=True, forbid_unknown_fields=True, kw_only=True):
    listen: str = "127.0.0.1:7003"
    engine: EngineConfig = EngineConfig()
    spare: EngineConfig | None = None
    peers: list[Peer] = msgspec.field(default_factory=list)
    tenants: dict[str, TenantConfig] = msgspec.field(default_factory=dict)
    upstream_token: str = ""

    def __post_init__(self) -> None:
        if self.engine.warm and self.engine.max_tokens == 1:
            raise ValueError("engine.warm needs engine.max_tokens above 1")


class StoreConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    capacity: int = 1


PREFIX = "COVEY_DECODE__"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "covey.toml"


def decode(
    file: Path | None = None, text: str = "", *, env: dict[str, str] | None = None, sets: tuple[str, ...] = ()
) -> Loaded[DecodeConfig]:
    if file is not None:
        file.write_text(text)
    return load(DecodeConfig, file=file, tables=("common", "decode"), env=env or {}, prefix=PREFIX, sets=sets)


def test_defaults_need_nothing() -> None:
    loaded = decode()
    assert loaded.config == DecodeConfig()
    assert loaded.source("engine.max_tokens") == "default"


def test_each_layer_wins_over_the_ones_before(file: Path) -> None:
    text = """
    [common]
    nats = "nats://common:1"
    drain_s = 1
    log_level = "debug"
    [decode]
    nats = "nats://decode:1"
    drain_s = 2
    [decode.engine]
    max_tokens = 3
    step_s = 3
    [gateway]
    whatever = "is not ours"
    """
    env = {"COVEY_DECODE__DRAIN_S": "4", "COVEY_DECODE__ENGINE__MAX_TOKENS": "4", "COVEY_GATEWAY__X": "1", "HOME": "/"}
    loaded = decode(file, text, env=env, sets=("engine.max_tokens=5",))
    config = loaded.config
    assert (config.log_level, config.nats, config.drain_s) == ("debug", "nats://decode:1", 4)
    assert (config.engine.max_tokens, config.engine.step_s, config.engine.warm) == (5, 3, True)
    assert [
        loaded.source(p) for p in ("log_level", "nats", "drain_s", "engine.max_tokens", "engine.step_s", "listen")
    ] == [
        "covey.toml [common]",
        "covey.toml [decode]",
        "env COVEY_DECODE__DRAIN_S",
        "--set engine.max_tokens",
        "covey.toml [decode]",
        "default",
    ]


@pytest.mark.parametrize(
    ("setting", "path", "expected"),
    [
        ("engine.devices=cpu, cuda:0", "devices", ["cpu", "cuda:0"]),
        ('engine.devices=["a,b"]', "devices", ["a,b"]),
        ("engine.devices=", "devices", []),
        ("engine.warm=false", "warm", False),
        ("engine.step_s=0.25", "step_s", 0.25),
        ("engine.draft=123", "draft", "123"),
        ("engine.draft=a=b", "draft", "a=b"),
        ("engine.draft=", "draft", None),
        ("engine.seed=", "seed", None),
        ("engine.seed=7", "seed", 7),
        ('engine={"seed": 9}', "seed", 9),
    ],
)
def test_text_becomes_what_the_type_asks_for(setting: str, path: str, expected: object) -> None:
    assert getattr(decode(sets=(setting,)).config.engine, path) == expected


def test_an_absent_table_can_be_filled_key_by_key(file: Path) -> None:
    assert decode(sets=("spare.seed=3",)).config.spare == EngineConfig(seed=3)
    assert decode(sets=("spare=", "spare.seed=3")).config.spare == EngineConfig(seed=3)
    assert decode(file, "[decode.spare]\n").config.spare == EngineConfig()


def test_tables_and_lists_of_tables(file: Path) -> None:
    text = """
    [[decode.peers]]
    host = "a"
    [[decode.peers]]
    host = "b"
    port = 2
    [tenants.acme]
    key_file = "acme.key"
    weight = 2
    """
    loaded = decode(file, text, env={"COVEY_DECODE__TENANTS__ACME__TOKENS_PER_MINUTE": "900"})
    assert loaded.config.peers == [Peer(host="a"), Peer(host="b", port=2)]
    assert loaded.config.tenants == {"acme": TenantConfig(key_file="acme.key", weight=2.0, tokens_per_minute=900)}
    assert loaded.source("tenants.acme.weight") == "covey.toml [tenants]"


def test_common_serves_services_that_know_only_part_of_it(file: Path) -> None:
    file.write_text('[common]\nnats = "nats://x:1"\ncapacity = 4\n')
    assert load(StoreConfig, file=file, tables=("common", "kvstore")).config == StoreConfig(capacity=4)


@pytest.mark.parametrize(
    ("text", "field", "says"),
    [
        ("[decode]\nlisten_on = 1", "listen_on", "covey.toml [decode]: unknown key listen_on; did you mean listen?"),
        ("[decode.engine]\nmax_token = 1", "engine.max_token", "did you mean max_tokens?"),
        ("[decode.engine]\nmax_tokens = 0", "engine.max_tokens", "Expected `int` >= 1"),
        ('[decode.engine]\nmax_tokens = "8"', "engine.max_tokens", "Expected `int`, got `str`"),
        ("[decode]\nengine = 3", "engine", "Expected `object`, got `int`"),
        ("[decode.listen]\nhost = 1", "listen", "Expected `str`, got `object`"),
        ("[[decode.peers]]\nhst = 1", "peers[0]", "hst"),
        ("[common]\nnatz = 1", "natz", "did you mean nats?"),
        ("[decod]\n", "decod", "unknown table [decod]; did you mean decode?"),
        ("decode = 1", "decode", "[decode] must be a table"),
        ("[tenants.acme]\nweight = 1", "tenants.acme", "missing required field `key_file`"),
        ('[tenants.acme]\nkey_file = "x"\nweight = 0', "tenants.acme.weight", "> 0"),
        ("[decode.engine]\nmax_tokens = 1", None, "engine.warm needs"),
        ("[decode", None, "covey.toml is not TOML"),
    ],
)
def test_a_mistake_in_the_file_is_named(file: Path, text: str, field: str | None, says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        decode(file, text)
    assert caught.value.field == field
    assert says in str(caught.value)


@pytest.mark.parametrize("key", ["nats", "log_level"])
def test_a_foreign_common_value_is_still_checked(file: Path, key: str) -> None:
    file.write_text(f"[common]\n{key} = 3\n")
    with pytest.raises(ConfigError, match=key):
        load(StoreConfig, file=file, tables=("common", "kvstore"))


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ("engine.max_tokens", "is not name=value"),
        ("engine.max_tokens=lots", "--set engine.max_tokens: engine.max_tokens: Expected `int`"),
        ("engine.nope=1", "unknown key engine.nope"),
        ("listen.host=1", "listen holds a single value"),
        ("engine.devices=[1", "is not JSON"),
        ("engine.max_tokens=", "Expected `int`"),
        ("=1", "unknown key"),
    ],
)
def test_a_mistake_on_the_command_line_is_named(setting: str, says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        decode(sets=(setting,))
    assert says in str(caught.value)


def test_a_mistake_in_the_environment_is_named() -> None:
    with pytest.raises(ConfigError, match=r"env COVEY_DECODE__ENGINE__MAX: unknown key engine\.max"):
        decode(env={"COVEY_DECODE__ENGINE__MAX": "1"})


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"absent\.toml: No such file"):
        load(StoreConfig, file=tmp_path / "absent.toml")


def test_the_rendering_shows_sources_and_no_secret(file: Path) -> None:
    text = (
        '[decode]\nnats = "nats://user:hunter2@host:4222"\nupstream_token = "hunter2"\nmesh_token_file = "mesh.token"'
    )
    lines = render(decode(file, text, sets=("engine.max_tokens=5",))).splitlines()
    assert not any("hunter2" in line for line in lines)
    shown = {line.split(" = ")[0]: line for line in lines}
    assert shown["nats"].split() == ["nats", "=", '"nats://***@host:4222"', "#", "covey.toml", "[decode]"]
    assert '"***"' in shown["upstream_token"]
    assert '"mesh.token"' in shown["mesh_token_file"]
    assert shown["engine.max_tokens"].endswith("# --set engine.max_tokens")
    assert shown["engine.warm"].split() == ["engine.warm", "=", "true", "#", "default"]


# -- secret files ------------------------------------------------------------


def test_a_secret_is_written_for_its_owner_only_and_read_back(tmp_path: Path) -> None:
    path = tmp_path / "mesh.token"
    write_secret(path, "s3cret")
    assert path.stat().st_mode & 0o777 == 0o600
    assert read_secret(path) == "s3cret"
    with pytest.raises(FileExistsError):
        write_secret(path, "another")
    assert read_secret(path) == "s3cret"


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o644])
def test_a_secret_that_others_reach_is_refused(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "key"
    write_secret(path, "s3cret")
    path.chmod(mode)
    with pytest.raises(InvalidArgument, match="chmod 600") as caught:
        read_secret(path)
    assert "s3cret" not in str(caught.value)


def test_a_secret_file_holds_a_secret(tmp_path: Path) -> None:
    for name, content in [("empty", b" \n"), ("long", b"x" * (SECRET_BYTES_MAX + 1)), ("binary", b"\xff\xfe")]:
        path = tmp_path / name
        path.touch(mode=0o600)
        path.write_bytes(content)
        with pytest.raises(InvalidArgument, match=name):
            read_secret(path)
    with pytest.raises(InvalidArgument, match="No such file"):
        read_secret(tmp_path / "absent")
    with pytest.raises(InvalidArgument, match="plain file"):
        read_secret("/dev/null")
