"""A stream of questions as the drivers of caches read it, and how a cache with `get` and `put` answers it."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

MISS, RIGHT, FALSE = 0, 1, 2


def play(folder: str, get: Callable[[str, Any], str | None], put: Callable[[str, str, Any], None]) -> dict[str, Any]:
    """Ask every question in order; keep the answer of each that is not served.

    `texts.json` holds the keys, `answers.npy` which answer is right for each, `vectors.npy` its vectors; a row of zeros
    is a text too long for the encoder: asked of the model, never kept. Returns what came of each question and the
    seconds of each look-up and of each insertion, and what memory they took.
    """
    texts = json.loads((Path(folder) / "texts.json").read_text())
    answers, vectors = np.load(Path(folder) / "answers.npy"), np.load(Path(folder) / "vectors.npy")
    outcomes, lookups, inserts = [], [], []
    before = _pss_bytes()
    for text, answer, vector in zip(texts, answers, vectors, strict=True):
        if not vector.any():
            outcomes.append(MISS)
            continue
        began = time.perf_counter()
        found = get(text, vector)
        lookups.append(time.perf_counter() - began)
        if found is not None:
            outcomes.append(RIGHT if found == str(answer) else FALSE)
            continue
        outcomes.append(MISS)
        began = time.perf_counter()
        put(text, str(answer), vector)
        inserts.append(time.perf_counter() - began)
    used = max(0, _pss_bytes() - before)
    return {"outcomes": outcomes, "lookup_s": lookups, "insert_s": inserts, "memory_bytes": used}


def _pss_bytes() -> int:
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))
