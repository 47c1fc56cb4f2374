"""What a driver and the benchmark say to each other: one JSON object a line, standard library only.

A driver prints `{"ready": VERSION}` once its model is loaded; then each request `{"op": NAME, ...}` is answered by
`{"result": ...}` or `{"error": TEXT}`. It ends when its standard input does.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Mapping
from typing import IO, Any

Operation = Callable[..., Any]


def private_output() -> IO[str]:
    """Standard output as it is, for our lines alone: from now on, what else is printed joins standard error."""
    lines = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return lines


def serve(version: str, operations: Mapping[str, Operation], lines: IO[str]) -> None:
    """Answer requests until standard input ends; an operation that raises is an answer, too."""
    _write(lines, {"ready": version})
    for line in sys.stdin:
        request = json.loads(line)
        operation = operations.get(request.pop("op"))
        try:
            if operation is None:
                raise ValueError("no such operation")
            answer = {"result": operation(**request)}
        except Exception as error:  # noqa: BLE001 - whatever a peer raises is a failed measurement, not our end
            answer = {"error": f"{type(error).__name__}: {error}"}
        _write(lines, answer)


def _write(lines: IO[str], answer: Mapping[str, Any]) -> None:
    lines.write(json.dumps(answer) + "\n")
    lines.flush()
