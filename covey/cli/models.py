"""`--model` as a person writes it: a name, `name=path`, `name=https://…`, or a path alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from covey.errors import InvalidArgument

DEFAULT = "smollm2"


def parse_models(texts: Sequence[str]) -> tuple[dict[str, str], dict[str, str]]:
    """Split into local models (name → source) and remote ones (name → URL).

    Raises:
        InvalidArgument: two models share a name.
    """
    local: dict[str, str] = {}
    remote: dict[str, str] = {}
    for text in texts or (DEFAULT,):
        name, _, source = text.rpartition("=") if "=" in text else ("", "", text)
        name = name or (Path(source).stem if "/" in source else source)
        if name in local or name in remote:
            raise InvalidArgument(f"two models are called {name!r}: write --model other={source}", field="model")
        (remote if source.startswith(("http://", "https://")) else local)[name] = source
    return local, remote
