"""Python processes in which some packages are not there, as on a machine that installed only a part of Covey."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from functools import cache
from importlib import metadata
from pathlib import Path

SITE = """
import sys

BLOCKED = frozenset({blocked!r})


class Without:
    def __init__(self, finder):
        self._finder = finder

    def __getattr__(self, name):
        return getattr(self._finder, name)

    def find_spec(self, name, path=None, target=None):
        return None if name.partition(".")[0] in BLOCKED else self._finder.find_spec(name, path, target)


sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]
"""


def run_without(packages: frozenset[str], folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run Python with `packages` missing and its files under `folder`."""
    (folder / "sitecustomize.py").write_text(SITE.format(blocked=sorted(packages)))
    environment = {**os.environ, "PYTHONPATH": str(folder), "COVEY_HOME": str(folder / "home")}
    return subprocess.run(
        [sys.executable, *arguments], env=environment, capture_output=True, text=True, timeout=60, check=False
    )


@cache
def beyond_core() -> frozenset[str]:
    """Import names of all that is installed and that `pip install covey` alone would not bring."""
    core = _closure("covey")
    owners = metadata.packages_distributions()
    names = {name for name, by in owners.items() if not core & {_canonical(owner) for owner in by}}
    return frozenset(names - {"covey", "services", "benchmarks"} - set(sys.stdlib_module_names))


def _closure(root: str) -> set[str]:
    """Names of a distribution and of what it requires without any extra."""
    found, todo = set(), [root]
    while todo:
        name = _canonical(todo.pop())
        if name in found:
            continue
        found.add(name)
        try:
            requires = metadata.requires(name) or []
        except metadata.PackageNotFoundError:
            continue  # for another Python or platform
        todo += [match[0] for text in requires if "extra ==" not in text and (match := re.match(r"[\w.-]+", text))]
    return found


def _canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
