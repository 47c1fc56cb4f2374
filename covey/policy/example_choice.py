"""Which examples a model is shown, in what order, and how: useful ones that differ, within a budget of tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

INSTRUCTION = (
    "Below are earlier requests with good answers. Use them where they fit: follow their format and their way of "
    "solving, not their content. Ignore what does not fit. Answer the last request only."
)


@dataclass(frozen=True, slots=True, kw_only=True)
class UsefulExample:
    """An example with its predicted `utility`; `vector` has unit length."""

    id: str
    text: str
    answer: str
    similarity: float
    utility: float
    vector: NDArray[np.float32]


def choose_examples(
    candidates: Sequence[UsefulExample], *, count: int, threshold: float, tokens_max: int, tokens: Callable[[str], int],
    diversity: float = 0.3,
) -> list[UsefulExample]:  # fmt: skip
    """Take up to `count` examples over the threshold whose texts fit into `tokens_max`, the most useful one last.

    Each is weighed against those taken: utility less `diversity` times the largest similarity to one of them (maximal
    marginal relevance, ours for the paper's RetrieveComb). The most useful stands next to the request.
    """
    left = [example for example in candidates if example.utility > threshold]
    taken: list[UsefulExample] = []
    spent = tokens(INSTRUCTION)
    while left and len(taken) < count:
        best = max(left, key=lambda example: (_worth(example, taken, diversity), example.id))
        left.remove(best)
        cost = tokens(shown(best))
        if spent + cost <= tokens_max:
            taken.append(best)
            spent += cost
    return sorted(taken, key=lambda example: (example.utility, example.id))


def with_examples(request: str, examples: Sequence[UsefulExample]) -> str:
    """Return the user turn that shows the examples; the request itself when there are none (layout of Fig. 23-25)."""
    if not examples:
        return request
    return "\n\n".join((INSTRUCTION, *map(shown, examples), f"Request: {request}\nAnswer:"))


def shown(example: UsefulExample) -> str:
    """Return an example as the model sees it."""
    return f"Request: {example.text}\nAnswer: {example.answer}"


def _worth(example: UsefulExample, taken: Sequence[UsefulExample], diversity: float) -> float:
    nearest = max((float(example.vector @ other.vector) for other in taken), default=0.0)
    return example.utility - diversity * nearest
