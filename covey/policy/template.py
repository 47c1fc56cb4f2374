"""Templates of semantic calls: text that names variables as `{{name}}`."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

from covey.errors import InvalidArgument

NAME_CHARS_MAX = 128
NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]{0,127}")
_PLACEHOLDER = re.compile(r"\{\{\s*([A-Za-z_][A-Za-z0-9_.-]{0,127})\s*\}\}")


def is_name(text: str) -> bool:
    """Whether `text` can name a variable: a letter or `_`, then letters, digits, `_`, `.` and `-`, 128 at most."""
    return NAME.fullmatch(text) is not None


def names(template: str) -> tuple[str, ...]:
    """Return the variables that `template` names, each once, in order. Braces around anything else are text."""
    return tuple(dict.fromkeys(_PLACEHOLDER.findall(template)))


def render(template: str, values: Mapping[str, str]) -> str:
    """Put values in, in one pass: braces inside a value stay text.

    Raises:
        InvalidArgument: a variable has no value; its name is the field.
    """

    def value(match: re.Match[str]) -> str:
        name = match[1]
        if name not in values:
            raise InvalidArgument(f"the template names {name!r}, which has no value", field=name)
        return values[name]

    return _PLACEHOLDER.sub(value, template)


def rename(template: str, new_name: Callable[[str], str]) -> str:
    """Replace each variable's name; the text around stays as it is."""
    return _PLACEHOLDER.sub(lambda match: "{{" + new_name(match[1]) + "}}", template)
