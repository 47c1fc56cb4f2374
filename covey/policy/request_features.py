"""What is known of a request before any model has seen it, as a few numbers for the choice of the model."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

FEATURES = 9
"""How many numbers describe a request, the constant included."""

_NUMBER = re.compile(r"\d+")
_NEARNESS = 8.0
"""How steeply a neighbour's weight falls with its distance."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """An earlier request like this one: how like, and what the cheapest and the dearest model earned, where known."""

    similarity: float
    cheap: float | None = None
    dear: float | None = None


def request_features(text: str, neighbours: Sequence[Outcome]) -> NDArray[np.float64]:
    """Describe a request by its form and by what came of its neighbours, the likeliest first."""
    words = text.split()
    near = sorted((outcome.similarity for outcome in neighbours), reverse=True)
    cheap = _expected([(o.similarity, o.cheap) for o in neighbours])
    dear = _expected([(o.similarity, o.dear) for o in neighbours])
    return np.array(
        [
            1.0,
            math.log1p(len(words)) / 5.0,
            min(1.0, len(_NUMBER.findall(text)) / 8.0),
            min(1.0, (text.count(".") + text.count("?") + text.count("\n")) / 10.0),
            near[0] if near else 0.0,
            sum(near[:5]) / 5.0,
            cheap,
            dear,
            dear - cheap,
        ]
    )


def _expected(known: Sequence[tuple[float, float | None]]) -> float:
    """The mean reward of the neighbours, nearer ones counting more, drawn to one half while there are few."""
    total, weight = 0.5, 1.0
    for similarity, reward in known:
        if reward is not None:
            share = math.exp(_NEARNESS * (similarity - 1.0))
            total += 4.0 * share * reward
            weight += 4.0 * share
    return total / weight
