"""What the documents name exists: files, the names in them, settings, commands, and their Python compiles."""

from __future__ import annotations

import ast
import re
import runpy
from functools import cache
from pathlib import Path
from typing import Any

import anyio
import pytest

import covey
from covey.cli.main import COMMANDS
from covey.types.flow import ToolNode
from tools import sample_config

ROOT = Path(__file__).parents[3]
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *(ROOT / "docs" / "adr").glob("*.md")])
GUIDES = [page for page in PAGES if page.name != "contracts.md"]
"""Pages whose code is for users to run; the contracts show signatures."""
PLACE = re.compile(
    r"`((?:covey|services|tests|tools|benchmarks|examples|docs|deploy)/[\w/.-]+|[\w-]+\.(?:md|toml|yaml))(?::([\w.]+))?`"
)
LINK = re.compile(r"\]\((?!https?:|#)([^)#]+)(?:#[^)]*)?\)")
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
COMMAND = re.compile(r"^\s*\$?\s*(?:\.venv/bin/)?covey ([a-z]+)(.*)$", re.MULTILINE)
OPTION = re.compile(r"(?<![\w-])--[a-z][a-z-]*")
SET = re.compile(r"--set ([a-z_.]+)=")


def fenced(page: Path, *languages: str) -> list[str]:
    return [body for language, body in FENCE.findall(page.read_text()) if language in languages]


@cache
def defined(path: Path) -> frozenset[str]:
    """Dotted names that a module defines: functions, classes, their members, constants."""
    names: set[str] = set()

    def visit(body: list[ast.stmt], prefix: str) -> None:
        for node in body:
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                names.add(prefix + node.name)
            if isinstance(node, ast.ClassDef):
                visit(node.body, f"{prefix}{node.name}.")
            targets = (
                node.targets
                if isinstance(node, ast.Assign)
                else [node.target]
                if isinstance(node, ast.AnnAssign)
                else []
            )
            names.update(prefix + target.id for target in targets if isinstance(target, ast.Name))

    visit(ast.parse(path.read_text()).body, "")
    return frozenset(names)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_and_names_exist(page: Path) -> None:
    for place, name in PLACE.findall(page.read_text()):
        path = next((at for at in (ROOT / place, page.parent / place) if at.exists()), None)
        if place == "mesh.toml":
            continue  # written by `covey up` into its run directory
        assert path is not None, f"{page.name}: there is no {place}"
        assert not name or name in defined(path), f"{page.name}: {place} defines no {name}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in LINK.findall(page.read_text()):
        assert (page.parent / target).exists(), f"{page.name}: {target}"


@pytest.mark.parametrize("page", GUIDES, ids=lambda page: page.name)
def test_python_compiles_and_uses_what_covey_offers(page: Path) -> None:
    for code in fenced(page, "python"):
        tree = compile(code, str(page), "exec", ast.PyCF_ONLY_AST | ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "covey":
                assert node.attr in covey.__all__, f"{page.name}: covey.{node.attr}"


SDK_CODE = [
    (page.name, i, code) for page in GUIDES for i, code in enumerate(fenced(page, "python")) if "\nanyio.run(" in code
]


@pytest.mark.parametrize(("page", "number", "code"), SDK_CODE, ids=[f"{page}-{i}" for page, i, _ in SDK_CODE])
def test_declarations_are_accepted(page: str, number: int, code: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything but `main` runs: templates fit signatures, tools have schemas, workflows build."""
    ran: list[object] = []
    monkeypatch.setattr(anyio, "run", ran.append)
    names: dict[str, Any] = {}
    exec(compile(code, f"{page}[{number}]", "exec"), names)
    assert ran == [names["main"]]
    if "workflow" in names:
        built, _ = names["workflow"]().build({"thing": "sorted list"})
        assert {node.work.tool for node in built.nodes if isinstance(node.work, ToolNode)} <= set(names)


@pytest.mark.parametrize("example", sorted((ROOT / "examples").glob("*.py")), ids=lambda path: path.name)
def test_examples_declare_what_they_run(example: Path) -> None:
    names = runpy.run_path(str(example), run_name="example")
    assert callable(names["main"])
    if "workflow" in names:
        names["workflow"]().build({"thing": "graph"})


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_and_their_options_exist(page: Path) -> None:
    for code in fenced(page, "console", "sh", "bash"):
        for name, rest in COMMAND.findall(code):
            assert name in COMMANDS, f"{page.name}: covey {name}"
            unknown = set(OPTION.findall(rest.partition("#")[0])) - options_of(name)
            assert not unknown, f"{page.name}: covey {name} has no {unknown}"


@cache
def options_of(command: str) -> frozenset[str]:
    from importlib import import_module

    import click

    group = getattr(import_module(COMMANDS[command][0]), command)
    commands = [group, *(group.commands.values() if isinstance(group, click.Group) else ())]
    return frozenset(option for each in commands for parameter in each.params for option in parameter.opts) | {"--help"}


@pytest.mark.parametrize("page", GUIDES, ids=lambda page: page.name)
def test_settings_exist(page: Path) -> None:
    known = {f"{table.name}.{setting.name}" for table in sample_config.tables() for setting in table.settings}
    for path in SET.findall(page.read_text()):
        is_common = f"common.{path.rpartition('.')[2]}" in known
        assert is_common or path in known or any(name.endswith(f".{path}") for name in known), f"{page.name}: {path}"


def test_the_readme_is_the_package_page() -> None:
    # `readme` in pyproject: it must stand on its own and keep the place where measured figures go.
    text = (ROOT / "README.md").read_text()
    assert text.startswith("# Covey\n")
    assert "## Figures" in text
