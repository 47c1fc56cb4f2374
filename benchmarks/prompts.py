"""Prompts to measure with: MT-Bench's first turns where the data folder has them, the project's own otherwise."""

from __future__ import annotations

import json
from pathlib import Path

OWN = (
    "Explain in three sentences why the sky is blue.",
    "Write a short poem about a river that forgets its name.",
    "List five things to check before deploying a web service.",
    "Summarise the plot of Romeo and Juliet for a child.",
    "What is the difference between a process and a thread?",
    "Give me a recipe for lentil soup with common ingredients.",
    "A train leaves at 9:40 and arrives at 13:05. How long is the journey?",
    "Translate to French: The library closes at six, but the garden stays open.",
    "Describe how a bill becomes a law, step by step.",
    "Why do cats purr? Answer as a veterinarian would.",
    "Write a Python function that returns the n-th Fibonacci number.",
    "Compare renting and buying a home for someone who moves often.",
)


def chat_prompts(data: Path | None) -> list[str]:
    """First user turns, in a fixed order."""
    file = data / "mt-bench" / "question.jsonl" if data else None
    if file is None or not file.exists():
        return list(OWN)
    rows = [json.loads(line) for line in file.read_text().splitlines() if line.strip()]
    return [row["turns"][0] for row in rows]
