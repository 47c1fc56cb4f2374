"""Hold the size budget: files ≤ 400 lines, functions ≤ 60; print what is over and the totals."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

FILE_LINES_MAX = 400
FUNCTION_LINES_MAX = 60


def sources() -> list[Path]:
    """Every Python file that git knows or would add."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.py"]
    listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    return [path for path in map(Path, listed) if path.is_file()]


def long_functions(path: Path, text: str) -> list[str]:
    """Functions of a file that are over the limit."""
    over = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            if lines > FUNCTION_LINES_MAX:
                over.append(f"{path}:{node.lineno}: {node.name} has {lines} lines (at most {FUNCTION_LINES_MAX})")
    return over


def main() -> int:
    """Exit 1 when something is over."""
    over, totals = [], dict.fromkeys(("covey", "services", "benchmarks", "tests"), 0)
    for path in sources():
        text = path.read_text()
        lines = text.count("\n")
        totals[path.parts[0]] = totals.get(path.parts[0], 0) + lines
        if lines > FILE_LINES_MAX:
            over.append(f"{path}: {lines} lines (at most {FILE_LINES_MAX}): which second concept lives here?")
        over += long_functions(path, text)
    print("lines:", ", ".join(f"{name} {count}" for name, count in totals.items()))
    print("\n".join(over))
    return 1 if over else 0


if __name__ == "__main__":
    sys.exit(main())
