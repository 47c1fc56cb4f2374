"""Configuration: frozen structs filled from one TOML file, the environment and `--set`, each value with its source."""

from __future__ import annotations

import difflib
import json
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType, NoneType, UnionType
from typing import Annotated, Any, Generic, Literal, TypeVar, Union, get_args, get_origin

import msgspec

from covey.errors import InvalidArgument

SHARED_TABLES = ("tenants", "models")
"""Top-level tables that every service whose struct has a field of that name receives whole."""
TABLES = (
    *("common", "gateway", "prefill", "decode", "kvstore", "semcache", "agentflow"),
    *SHARED_TABLES,
)
"""All a file may hold at its top; anything else is a typing mistake."""

Positive = Annotated[float, msgspec.Meta(gt=0)]
NonNegative = Annotated[float, msgspec.Meta(ge=0)]
PositiveInt = Annotated[int, msgspec.Meta(ge=1)]

C = TypeVar("C", bound=msgspec.Struct)
Path_ = tuple[str, ...]
DEFAULT = "default"

_SECRET_NAME = re.compile(r"(^|_)(token|secret|password|key)$")
_URL_CREDENTIALS = re.compile(r"(?<=://)[^/@\s]+(?=@)")
_AT = re.compile(r" - at `\$(?P<path>.*)`$")


class ConfigError(InvalidArgument):
    """A setting is wrong; `field` is its dotted path and the message names the source. Exit code 2."""


class CommonConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What every service knows; services subclass it, and `[common]` sets it for all of them."""

    nats: str = "nats://127.0.0.1:4222"
    nats_token_file: str | None = None
    mesh_token_file: str | None = None
    """The token of internal calls; without one the mesh is open to whoever reaches its ports."""
    run_dir: str = ".covey"
    worker: str = ""
    """This process's name in the registry; empty makes one up."""
    metrics_listen: str = "127.0.0.1:0"
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    otlp_endpoint: str | None = None
    """Where traces go, as `http://host:4317`; none are recorded without it."""
    drain_s: NonNegative = 20.0


class TenantConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One tenant: who it is and how much of the mesh it may use. `None` means no limit of its own."""

    key_file: str
    weight: Positive = 1.0
    """Share of contended capacity relative to other tenants."""
    requests_per_minute: PositiveInt | None = None
    tokens_per_minute: PositiveInt | None = None
    kv_quota_bytes: PositiveInt | None = None
    cache_quota_entries: PositiveInt | None = None


@dataclass(frozen=True, slots=True)
class Loaded(Generic[C]):
    """A configuration and, for each dotted path that something set, what set it."""

    config: C
    sources: Mapping[str, str]

    def source(self, path: str) -> str:
        """Return where the value at a dotted path comes from: `default` unless it, or what holds it, was set."""
        while path:
            if path in self.sources:
                return self.sources[path]
            path = path.rpartition(".")[0]
        return DEFAULT


def load(
    cls: type[C],
    *,
    file: Path | None = None,
    tables: Sequence[str] = ("common",),
    env: Mapping[str, str] = MappingProxyType({}),
    prefix: str = "",
    sets: Sequence[str] = (),
) -> Loaded[C]:
    """Build a `cls` from its defaults, `tables` of `file`, `env` and `sets`; later ones win.

    `COVEY_DECODE__ENGINE__MAX_TOKENS` with the prefix `COVEY_DECODE__`, and `--set engine.max_tokens=…`, both
    mean the field `max_tokens` of `engine`. Text becomes what the field's type asks for: lists as JSON or
    separated by commas, tables as JSON, nothing at all as none where that is allowed. Names in `env` without
    the prefix are ignored. Keys of `[common]` that this service lacks must be known to `CommonConfig`.

    Raises:
        ConfigError: an unknown key, a wrong value or an unreadable file; names the path and the source.
    """
    layers = _Layers(cls)
    if file is not None:
        _load_file(layers, file, tables)
    if prefix:
        for name in sorted(env):
            if name.startswith(prefix):
                path = tuple(name.removeprefix(prefix).lower().split("__"))
                layers.put_text(path, env[name], f"env {name}")
    for text in sets:
        name, equals, value = text.partition("=")
        if not equals:
            raise ConfigError(f"--set {text} is not name=value", field=name)
        layers.put_text(tuple(name.strip().split(".")), value, f"--set {name.strip()}")
    return layers.build()


def render(loaded: Loaded[Any]) -> str:
    """Return the whole configuration, one `path = value  # source` a line; secrets and URL passwords masked."""
    lines = [(f"{'.'.join(path)} = {_shown(path, value)}", path) for path, value in _leaves(loaded.config)]
    width = max((len(text) for text, _ in lines), default=0)
    return "".join(f"{text:<{width}}  # {loaded.source('.'.join(path))}\n" for text, path in lines)


class _Layers(Generic[C]):
    """Values by path, the last layer's on top, checked against the struct as they come."""

    def __init__(self, cls: type[C]) -> None:
        self.cls = cls
        self._values: dict[Path_, tuple[Any, str]] = {}

    def put_table(self, path: Path_, value: Any, source: str) -> None:
        """Add a TOML value, descending into tables wherever the type has fields."""
        kind = _type_at(self.cls, path, source)
        if isinstance(value, dict) and (_struct_in(kind) or _mapping_value(kind)):
            if not value:
                self._values.setdefault(path, ({}, source))
            for key, inner in value.items():
                self.put_table((*path, key), inner, source)
        else:
            _convert(value, kind, path, source)
            self._set(path, value, source)

    def put_text(self, path: Path_, text: str, source: str) -> None:
        """Add a value that came as text."""
        kind = _type_at(self.cls, path, source)
        self._set(path, msgspec.to_builtins(_from_text(text, kind, path, source)), source)

    def build(self) -> Loaded[C]:
        """Validate the whole and return it."""
        tree: dict[str, Any] = {}
        for path, (value, _) in sorted(self._values.items(), key=lambda item: len(item[0])):
            node = tree
            for key in path[:-1]:
                if not isinstance(node.get(key), dict):  # a lower layer's none gives way to a table
                    node[key] = {}
                node = node[key]
            node[path[-1]] = dict(value) if isinstance(value, dict) else value
        self._check_tables(tree)
        config = _convert(tree, self.cls, (), "the configuration")
        return Loaded(config, {".".join(path): source for path, (_, source) in self._values.items()})

    def _check_tables(self, tree: dict[str, Any]) -> None:
        """Check inner tables first: msgspec alone would not say which entry of a mapping is wrong."""
        inner = {path[:depth] for path in self._values for depth in range(1, len(path))}
        for path in sorted(inner, key=len, reverse=True):
            node = tree
            for key in path:
                node = node[key]
            _convert(node, _type_at(self.cls, path, ""), path, "the configuration")

    def _set(self, path: Path_, value: Any, source: str) -> None:
        stale = [old for old in self._values if old[: len(path)] == path]
        for old in stale:
            del self._values[old]
        self._values[path] = (value, source)


def _load_file(layers: _Layers[Any], file: Path, tables: Sequence[str]) -> None:
    data = _read_toml(file)
    own = _fields(layers.cls)
    for table in tables:
        source = f"{file.name} [{table}]"
        for key, value in data.get(table, {}).items():
            elsewhere = table == "common" and key not in own and key in _fields(CommonConfig)
            target = _Layers(CommonConfig) if elsewhere else layers  # another service's: checked, then dropped
            target.put_table((key,), value, source)
    for table in SHARED_TABLES:
        if table in data and table in own:
            layers.put_table((table,), data[table], f"{file.name} [{table}]")


def _read_toml(file: Path) -> dict[str, dict[str, Any]]:
    try:
        data = tomllib.loads(file.read_text())
    except OSError as error:
        raise ConfigError(f"cannot read {file}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file} is not TOML: {error}") from error
    for name, content in data.items():
        if name not in TABLES:
            raise ConfigError(f"{file.name}: unknown table [{name}]{_meant(name, TABLES)}", field=name)
        if not isinstance(content, dict) and name not in SHARED_TABLES:
            raise ConfigError(f"{file.name}: [{name}] must be a table", field=name)
    return data


def _fields(cls: type[msgspec.Struct]) -> dict[str, Any]:
    return {field.name: field.type for field in msgspec.structs.fields(cls)}


def _type_at(cls: type[msgspec.Struct], path: Path_, source: str) -> Any:
    """Follow `path` through structs and mappings to a type, or say which key is not there."""
    kind: Any = cls
    for depth, key in enumerate(path, start=1):
        struct, value_type = _struct_in(kind), _mapping_value(kind)
        if struct is not None:
            known = _fields(struct)
            if key not in known:
                where = ".".join(path[:depth])
                raise ConfigError(f"{source}: unknown key {where}{_meant(key, known)}", field=where)
            kind = known[key]
        elif value_type is not None:
            kind = value_type
        else:
            where = ".".join(path[: depth - 1])
            raise ConfigError(f"{source}: {where} holds a single value, not a table", field=where)
    return kind


def _plain(kind: Any) -> tuple[Any, ...]:
    """Return the alternatives of a type: its union members without `None`, `Annotated` taken off."""
    if get_origin(kind) is Annotated:
        return _plain(get_args(kind)[0])
    if get_origin(kind) in (Union, UnionType):
        return tuple(plain for arm in get_args(kind) if arm is not NoneType for plain in _plain(arm))
    return (kind,)


def _struct_in(kind: Any) -> type[msgspec.Struct] | None:
    arms = (arm for arm in _plain(kind) if isinstance(arm, type) and issubclass(arm, msgspec.Struct))
    return next(arms, None)


def _mapping_value(kind: Any) -> Any:
    """Return the value type of a mapping from names, else None."""
    arms = (get_args(arm) for arm in _plain(kind) if get_origin(arm) in (dict, Mapping))
    return next((args[1] for args in arms), None)


def _from_text(text: str, kind: Any, path: Path_, source: str) -> Any:
    arms = _plain(kind)
    if str in arms and text:
        value: Any = text
    elif text[:1] in ("[", "{"):
        try:
            value = json.loads(text)
        except json.JSONDecodeError as error:
            raise ConfigError(f"{source}: {'.'.join(path)} is not JSON: {error}", field=".".join(path)) from error
    elif any((get_origin(arm) or arm) in (list, tuple, set, frozenset) for arm in arms):
        value = [item.strip() for item in text.split(",") if item.strip()]
    else:
        value = text or (None if NoneType in get_args(kind) else text)
    return _convert(value, kind, path, source, strict=False)


def _convert(value: Any, kind: Any, path: Path_, source: str, *, strict: bool = True) -> Any:
    try:
        return msgspec.convert(value, kind, strict=strict)
    except msgspec.ValidationError as error:
        match = _AT.search(str(error))
        where = (".".join(path) + (match["path"] if match else "")).lstrip(".")
        reason = _AT.sub("", str(error))
        raise ConfigError(f"{source}: {where + ': ' if where else ''}{reason}", field=where or None) from error


def _meant(name: str, known: Sequence[str] | Mapping[str, Any]) -> str:
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {close[0]}?" if close else f"; known are {', '.join(sorted(known))}"


def _leaves(value: Any, path: Path_ = ()) -> Iterator[tuple[Path_, Any]]:
    if isinstance(value, msgspec.Struct):
        for name in value.__struct_fields__:
            yield from _leaves(getattr(value, name), (*path, name))
    elif isinstance(value, Mapping) and value:
        for key, inner in value.items():
            yield from _leaves(inner, (*path, key))
    else:
        yield path, value


def _shown(path: Path_, value: Any) -> str:
    if value is not None and _SECRET_NAME.search(path[-1]):
        return '"***"'
    return _URL_CREDENTIALS.sub("***", json.dumps(msgspec.to_builtins(value), ensure_ascii=False))
