"""One pool of earlier requests and answers that help a model with new ones (IC-Cache), bounded in number and bytes."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from random import Random

import anyio
import numpy as np
from anyio import to_thread
from numpy.typing import NDArray

from covey.policy.clusters import Clusters
from covey.policy.example_choice import UsefulExample, choose_examples
from covey.policy.example_worth import ExampleWorth
from covey.policy.helpfulness import ExampleView, Helpfulness, UtilityThreshold
from covey.policy.request_features import Outcome
from covey.types.ids import TenantId
from covey.types.semcache import Example

from .vectors import Vectors

CLUSTERED_FROM = 256
"""Under so many examples all of them are compared."""
GROWN_BY = 1.25
STAGE_ONE = 64
"""Examples that stage one hands to stage two."""
NEIGHBOURS = 20
CHARS_PER_TOKEN = 4
"""What a token is taken to be here: the service has no tokenizer of the models behind it."""


OUTCOMES_MAX = 4096
"""Requests whose outcomes are remembered, for the choice of the model."""


@dataclass(slots=True, eq=False)
class _Kept:
    text: str
    answer: str
    owner: TenantId
    model: str
    category: str
    vector: Vectors
    words: frozenset[str]
    quality: float = 0.5
    uses: int = 0


class ExamplePool:
    """Examples that may be shown to each other's askers. Owned by the event loop; clustering runs in a thread."""

    def __init__(self, *, entries_max: int, size_bytes_max: int, rng: Random) -> None:
        self._entries_max = entries_max
        self._worth = ExampleWorth(size_bytes_max=size_bytes_max)
        self._kept: dict[str, _Kept] = {}
        self._clusters: Clusters | None = None
        self._order: list[str] = []
        self._clustered: frozenset[str] = frozenset()
        self._earned: OrderedDict[tuple[TenantId, str], tuple[Vectors, dict[str, float]]] = OrderedDict()
        self._rng = rng
        self.helpfulness = Helpfulness()
        self.threshold = UtilityThreshold()

    def __len__(self) -> int:
        return len(self._kept)

    def add(
        self,
        entry: str,
        text: str,
        answer: str,
        *,
        owner: TenantId,
        model: str,
        category: str,
        vector: Vectors,
        now: float,
    ) -> None:
        """Keep a pair; what is worth least goes when the pool is full."""
        self._kept[entry] = _Kept(
            text=text,
            answer=answer,
            owner=owner,
            model=model,
            category=category,
            vector=vector,
            words=frozenset(text.lower().split()),
        )
        self._worth.add(entry, len(text) + len(answer) + vector.nbytes, now)
        for name in self._worth.evict(now):
            self.remove(name)
        while len(self._kept) > self._entries_max:
            self.remove(next(iter(self._kept)))

    def remove(self, entry: str) -> None:
        """Forget a pair, known or not."""
        self._kept.pop(entry, None)
        self._worth.remove(entry)

    def forget(self, owner: TenantId) -> None:
        """Forget all that came from a tenant."""
        for entry in [entry for entry, kept in self._kept.items() if kept.owner == owner]:
            self.remove(entry)
        for key in [key for key in self._earned if key[0] == owner]:
            del self._earned[key]

    def find(self, text: str, vector: Vectors, *, category: str, count: int, tokens_max: int) -> tuple[Example, ...]:
        """Return up to `count` useful examples that fit into the budget, the most useful one last.

        Stage one is by similarity within the nearest clusters, stage two by predicted help.
        """
        words = frozenset(text.lower().split())
        candidates = []
        for name, similarity in self._near(vector, STAGE_ONE):
            kept = self._kept[name]
            utility = self.helpfulness.predict(_view(name, kept, similarity, text, words, category))
            candidates.append(
                UsefulExample(
                    id=name,
                    text=kept.text,
                    answer=kept.answer,
                    similarity=similarity,
                    utility=utility,
                    vector=kept.vector,
                )
            )
        chosen = choose_examples(
            candidates, count=count, threshold=self.threshold.value, tokens_max=tokens_max, tokens=_tokens
        )
        return tuple(
            Example(entry=e.id, text=e.text, answer=e.answer, similarity=e.similarity, utility=e.utility)
            for e in chosen
        )

    def outcomes(self, vector: Vectors, models: tuple[str, ...]) -> list[Outcome]:
        """What the cheapest and the dearest of `models` earned with the requests most like this one."""
        if not self._earned:
            return []
        known = list(self._earned.values())
        similarities: NDArray[np.float32] = np.stack([where for where, _ in known]) @ vector
        nearest = np.argsort(-similarities, kind="stable")[:NEIGHBOURS]
        return [
            Outcome(
                similarity=float(similarities[i]), cheap=known[i][1].get(models[0]), dear=known[i][1].get(models[-1])
            )
            for i in nearest
        ]

    def remember(self, tenant: TenantId, text: str, vector: Vectors, model: str, reward: float) -> None:
        """A model earned so much with this request; kept examples of the same text are worth as much."""
        self._earned.setdefault((tenant, text), (vector, {}))[1][model] = reward
        self._earned.move_to_end((tenant, text))
        while len(self._earned) > OUTCOMES_MAX:
            self._earned.popitem(last=False)
        for kept in self._kept.values():
            if (kept.owner, kept.model, kept.text) == (tenant, model, text):
                kept.quality += 0.5 * (reward - kept.quality)

    def helped(
        self, entry: str, text: str, vector: Vectors, *, category: str, reward: float, cost: float, now: float
    ) -> None:
        """An answer that was given with this example earned `reward`; `cost` in [0, 1] is that of the model."""
        kept = self._kept.get(entry)
        if kept is None:
            return
        words = frozenset(text.lower().split())
        view = _view(entry, kept, float(kept.vector @ vector), text, words, category)
        utility = self.helpfulness.predict(view)
        self.helpfulness.observe(view, reward)
        self.threshold.observe(utility, reward - 0.5)
        kept.uses += 1
        self._worth.used(entry, offloaded=reward >= 0.5, quality=kept.quality, cost=cost, now=now)

    async def cluster(self, limiter: anyio.CapacityLimiter) -> bool:
        """Cluster anew if the pool has grown or lost a quarter since; returns whether it did."""
        count = len(self._kept)
        if count < CLUSTERED_FROM or len(self._order) / GROWN_BY <= count <= len(self._order) * GROWN_BY:
            return False
        order = list(self._kept)
        vectors = np.stack([self._kept[name].vector for name in order])
        rng = np.random.default_rng(self._rng.getrandbits(64))
        clusters = await to_thread.run_sync(Clusters.fit, vectors, rng, limiter=limiter)
        self._order, self._clusters, self._clustered = order, clusters, frozenset(order)
        return True

    def check(self) -> None:
        """Assert the invariants that hold between any two calls."""
        self._worth.check()
        assert len(self._kept) == len(self._worth) <= self._entries_max

    def _near(self, vector: Vectors, count: int) -> list[tuple[str, float]]:
        names = self._candidates(vector, count)
        if not names:
            return []
        similarities: NDArray[np.float32] = np.stack([self._kept[name].vector for name in names]) @ vector
        nearest = np.argsort(-similarities, kind="stable")[:count]
        return [(names[i], float(similarities[i])) for i in nearest]

    def _candidates(self, vector: Vectors, count: int) -> list[str]:
        """All, or the members of the nearest clusters and what came after the clustering."""
        if self._clusters is None:
            return list(self._kept)
        old = [self._order[i] for i in self._clusters.near(vector, 4 * count)]
        return [name for name in old if name in self._kept] + [n for n in self._kept if n not in self._clustered]


def _view(name: str, kept: _Kept, similarity: float, text: str, words: frozenset[str], category: str) -> ExampleView:
    return ExampleView(
        example=name,
        similarity=similarity,
        overlap=len(words & kept.words) / max(1, len(words)),
        request_chars=len(text),
        example_chars=len(kept.text),
        answer_chars=len(kept.answer),
        same_category=kept.category == category,
        quality=kept.quality,
        uses=kept.uses,
    )


def _tokens(text: str) -> int:
    return -(-len(text) // CHARS_PER_TOKEN)
