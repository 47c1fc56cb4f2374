"""Semantic functions: calls return futures at once, futures given to other calls form a graph that runs in the mesh.

Run it with `covey run examples/semantic_functions.py` while `covey up` runs.
"""

from __future__ import annotations

import anyio

import covey

TEXTS = (
    "Honey bees tell each other where flowers are by dancing on the comb.",
    "Ants lay scent trails, and the shortest way smells strongest.",
    "Termites build towers that stay cool without any of them knowing the plan.",
)


@covey.semantic(max_tokens=24, temperature=0)
def gist(text: str) -> str:
    """Say in at most ten words: {{text}}"""


@covey.semantic(max_tokens=60, temperature=0, system="You write one plain sentence.")
def compare(first: str, second: str, third: str) -> str:
    """What do these have in common?
    1. {{first}}
    2. {{second}}
    3. {{third}}
    """


async def main() -> None:
    async with covey.Client.connect() as client, client.program():
        gists = [gist(text) for text in TEXTS]  # three calls, at work side by side
        answer = compare(*gists)  # a fourth, which waits for them where they run
        async with answer.stream(objective=covey.latency()) as pieces:
            async for piece in pieces:
                print(piece, end="", flush=True)
        print()
        for text, short in zip(TEXTS, gists, strict=True):
            print(f"- {await short}  <- {text}")


if __name__ == "__main__":
    anyio.run(main)
