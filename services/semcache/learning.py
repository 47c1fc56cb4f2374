"""The step between a loaded encoder and classified requests: encoding the categories' examples."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from structlog.typing import FilteringBoundLogger

from covey.errors import CoveyError

from .cache import AnswerCache
from .encoder import Embedder
from .vectors import Vectors


async def learn_categories(
    examples: Mapping[str, Sequence[str]],
    embedder: Embedder,
    cache: AnswerCache,
    *,
    floor: float,
    log: FilteringBoundLogger,
) -> None:
    """Encode the examples of the categories once the encoder is there, and start to classify by them."""
    vectors: dict[str, list[Vectors]] = {}
    for name, texts in examples.items():
        try:
            encoded = [await embedder.many((text,), timeout_s=math.inf) for text in texts]
        except CoveyError as error:
            log.warning("categories not learnt", category=name, error=error.message)
            return
        vectors[name] = [one.vector for (one,) in encoded if one.vector is not None]
    usable = {name: found for name, found in vectors.items() if found}
    if usable:
        cache.learn(usable, floor=floor)
