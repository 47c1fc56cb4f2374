"""Write `covey.toml` and `docs/config.md` from the services' settings; `--check` only says whether they are fresh."""

from __future__ import annotations

import ast
import inspect
import sys
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from importlib import import_module
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import msgspec
import tomli_w

from covey.config import CommonConfig, TenantConfig

SERVICES = ("gateway", "prefill", "decode", "kvstore", "semcache", "agentflow")
SAMPLE = Path("covey.toml")
REFERENCE = Path("docs/config.md")
PLACEHOLDER = "NAME"
COMMENT_WIDTH = 110
COLUMNS = "| setting | type | default | meaning |\n|---|---|---|---|\n"
TOP_LEVEL = frozenset({"models"})
"""Fields of services that stand in tables of their own at the top of the file; tenants do too, at its end."""

SAMPLE_HEAD = """\
# Every setting of every service, with its default. Written by tools/sample_config.py: do not edit this copy by hand;
# copy it, uncomment what you change, and start with `covey up --config FILE` or `python -m services.X --config FILE`.
# docs/config.md says the same as a reference, and which sources win. `<...>` stands where a setting is unset.
"""

REFERENCE_HEAD = """\
# Settings
Written by `tools/sample_config.py` from the services' own structs; `covey.toml` is the same as a file to copy.

**Sources**, later ones win: the default; `[common]` of the file; the service's own table; `[tenants.*]` and
`[[models]]`; the environment (`COVEY_DECODE__KV_BYTES=…`, inner tables with two underscores:
`COVEY_GATEWAY__ADMISSION__PERMITS=…`); `--set kv_bytes=…` of a service, which is `--set decode.kv_bytes=…` of
`covey up`. A setting of `[common]` may stand in a service's table too.

An unknown table or setting, or a value of the wrong type, ends a service at start with exit code 2; the message names
the setting and its source. `python -m services.decode --config covey.toml --print-config` shows every value and where
it came from (secrets masked), `--check` only checks.

`covey up --config FILE` generates the addresses, tokens and models of its own mesh and lays your file over them: what
your file sets wins, so set there only what you mean to change.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """One field: `value` is its default, `None` when it is unset, `REQUIRED` when it must be given."""

    name: str
    kind: str
    value: Any
    meaning: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """One TOML table: `is_list` for `[[name]]`, `is_example` when none is there by default."""

    name: str
    meaning: str
    settings: tuple[Setting, ...]
    is_list: bool = False
    is_example: bool = False

    @property
    def header(self) -> str:
        return f"[[{self.name}]]" if self.is_list else f"[{self.name}]"


REQUIRED = msgspec.NODEFAULT


def tables() -> Iterator[Table]:
    """Every table a file may hold, in the order of the sample."""
    yield from _tables("common", CommonConfig, CommonConfig(), skip=frozenset())
    for name in SERVICES:
        cls: type[msgspec.Struct] = import_module(f"services.{name}.config").Config
        yield from _tables(name, cls, cls(), skip=_unchanged(cls))
    yield from _tables(f"tenants.{PLACEHOLDER}", TenantConfig, None, is_example=True)


def _unchanged(cls: type[msgspec.Struct]) -> frozenset[str]:
    """Names of the common settings whose default this service leaves as it is."""
    common, own = CommonConfig(), cls()
    return frozenset(n for n in CommonConfig.__struct_fields__ if getattr(common, n) == getattr(own, n))


def _tables(
    name: str,
    cls: type[msgspec.Struct],
    default: msgspec.Struct | None,
    *,
    skip: frozenset[str] = frozenset(),
    is_list: bool = False,
    is_example: bool = False,
) -> Iterator[Table]:
    meanings, settings, inner = _docs_of(cls), [], []
    for field in msgspec.structs.fields(cls):
        if field.name in skip or field.name == "tenants":
            continue
        value = field.default if default is None else getattr(default, field.name)
        nested = _nested(field.name, field.type, value, name)
        if nested is not None:
            inner.append(nested)
            continue
        meaning = meanings.get(field.name, "")
        settings.append(Setting(name=field.name, kind=kind_of(field.type), value=value, meaning=meaning))
    meaning = inspect.cleandoc(cls.__doc__ or "")
    yield Table(name=name, meaning=meaning, settings=tuple(settings), is_list=is_list, is_example=is_example)
    for tables_of_field in inner:
        yield from tables_of_field


def _nested(name: str, kind: Any, value: Any, parent: str) -> Iterator[Table] | None:
    """The tables of a field that is a struct, a list of structs, or a mapping to structs; None for a plain field."""
    origin, arguments = get_origin(kind), get_args(kind)
    if isinstance(value, msgspec.Struct):
        return _tables(f"{parent}.{name}", type(value), value)
    if origin is tuple and _is_struct(arguments[0]):
        where = name if name in TOP_LEVEL else f"{parent}.{name}"
        return _tables(where, arguments[0], value[0], is_list=True)
    if origin in (dict, Mapping) and _is_struct(arguments[1]):
        return _tables(f"{parent}.{name}.{PLACEHOLDER}", arguments[1], None, is_example=True)
    return None


def _is_struct(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, msgspec.Struct)


def _docs_of(cls: type[msgspec.Struct]) -> dict[str, str]:
    """What stands as a docstring under each field, inherited fields included."""
    docs: dict[str, str] = {}
    for each in reversed(cls.__mro__):
        if each.__module__.partition(".")[0] not in ("covey", "services"):
            continue
        (node,) = ast.parse(textwrap.dedent(inspect.getsource(each))).body
        assert isinstance(node, ast.ClassDef)
        for field, after in zip(node.body, node.body[1:], strict=False):
            if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
                text = _text_of(after)
                if text:
                    docs[field.target.id] = inspect.cleandoc(text)
    return docs


def _text_of(node: ast.stmt) -> str:
    is_text = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    return str(node.value.value) if is_text and isinstance(node.value.value, str) else ""  # type: ignore[attr-defined]


def kind_of(kind: Any) -> str:
    """Say a type in words: `integer from 1`, `text`, one of some words."""
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return kind_of(arguments[0]) + "".join(_bounds(a) for a in arguments[1:] if isinstance(a, msgspec.Meta))
    if origin in (Union, UnionType):
        return " or ".join(kind_of(a) for a in arguments if a is not NoneType)
    if origin is Literal:
        return ", ".join(f'"{a}"' for a in arguments)
    if origin in (tuple, list):
        return f"list of {kind_of(arguments[0])}"
    if isinstance(kind, type) and issubclass(kind, Enum):
        return ", ".join(f'"{member.value}"' for member in kind)
    return {str: "text", int: "integer", float: "number", bool: "true or false"}[kind]


def _bounds(meta: msgspec.Meta) -> str:
    low = f" from {meta.ge:g}" if meta.ge is not None else f" over {meta.gt:g}" if meta.gt is not None else ""
    return low + (f" to {meta.le:g}" if meta.le is not None else "")


def sample() -> str:
    """The text of `covey.toml`: every setting commented out, so that the file as it is changes nothing."""
    parts = [SAMPLE_HEAD]
    for table in tables():
        parts.append("\n" + _commented(table.meaning))
        # A table whose settings are all comments is harmless, but `[[models]]` without a name is not.
        parts.append(f"{'#' if table.is_list or table.is_example else ''}{table.header}\n")
        parts += [_sample_setting(setting) for setting in table.settings]
    return "".join(parts)


def _commented(text: str) -> str:
    flat = " ".join(text.split())
    return "".join(f"# {line}\n" for line in textwrap.wrap(flat, COMMENT_WIDTH, break_on_hyphens=False))


def _sample_setting(setting: Setting) -> str:
    return f"{_commented(setting.meaning)}#{setting.name} = {_toml(setting)}\n"


def _toml(setting: Setting) -> str:
    if setting.value is None or setting.value is REQUIRED:
        return f"<{setting.kind}>"
    return tomli_w.dumps({"x": msgspec.to_builtins(setting.value)}).removeprefix("x = ").strip()


def reference() -> str:
    """The text of `docs/config.md`."""
    parts = [REFERENCE_HEAD]
    for table in tables():
        parts.append(f"\n## `{table.header}`\n{table.meaning}\n\n{COLUMNS}")
        for setting in table.settings:
            meaning = " ".join(setting.meaning.split()).replace("|", "\\|")
            parts.append(f"| `{setting.name}` | {setting.kind} | {_default(setting)} | {meaning} |\n")
    return "".join(parts)


def _default(setting: Setting) -> str:
    if setting.value is REQUIRED:
        return "required"
    return "unset" if setting.value is None else f"`{_toml(setting)}`"


def main(argv: list[str]) -> int:
    """Write both files, or with `--check` exit with 1 when one is not what would be written."""
    stale = [path for path, text in ((SAMPLE, sample()), (REFERENCE, reference())) if _differs(path, text)]
    if "--check" in argv:
        print("\n".join(f"{path} is not up to date: run tools/sample_config.py" for path in stale))
        return 1 if stale else 0
    SAMPLE.write_text(sample())
    REFERENCE.write_text(reference())
    return 0


def _differs(path: Path, text: str) -> bool:
    return not path.exists() or path.read_text() != text


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
