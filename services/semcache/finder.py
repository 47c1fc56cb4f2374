"""Finding what may answer a query: exact key, category, nearest neighbours of its shelf, decision."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from hashlib import blake2b
from random import Random

from covey.clock import Clock
from covey.errors import CoveyError, InvalidArgument
from covey.policy.entry_bound import EntryBounds
from covey.policy.evidence import NEIGHBOURS
from covey.policy.reuse import Candidate, CategoryPolicy, ReuseDecision, ReuseMode, ReusePolicy, ReuseScope, ReuseView
from covey.types.semcache import CacheQuery

from .accounts import Accounts
from .classifier import Classifier
from .encoder import Embedder
from .entry import Document, Partition, Scope, Shelf, answer_hash
from .library import Library
from .metrics import CacheMetrics
from .rewrite import history_key, spelt
from .vectors import Vectors

EXPLORED_MAX = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheLimits:
    """Bounds of one look-up and one entry: `neighbours` are considered, `encode_s` is waited for the encoder."""

    neighbours: int = 4
    encode_s: float = 0.25
    entry_size_bytes_max: int = 1_048_576


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """What the tables say about a query."""

    category: str
    decision: ReuseDecision
    document: Document | None
    text: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Placed:
    """The category of a query, and its vector where one is needed and could be had (else `why` not)."""

    category: str
    vector: Vectors | None = None
    why: str = ""


class Finder:
    """Looks, and changes nothing but the accounts of relaxation and break-even. Owned by the event loop.

    A semantic look-up searches only the shelf of equal tenant, model, category and context key, so no neighbour of
    another partition can hide one of this one.
    """

    def __init__(
        self,
        library: Library,
        policy: ReusePolicy,
        embedder: Embedder,
        accounts: Accounts,
        *,
        classifies: bool,
        limits: CacheLimits,
        metrics: CacheMetrics,
        clock: Clock,
        rng: Random,
    ) -> None:
        self._library = library
        self._store = library.store
        self._policy = policy
        self._embedder = embedder
        self._accounts = accounts
        self._classifies = classifies
        self._classifier: Classifier | None = None
        self._limits = limits
        self._metrics = metrics
        self._clock = clock
        self._rng = rng
        self._explored: OrderedDict[bytes, tuple[str, float, int]] = OrderedDict()

    def learn(self, examples: Mapping[str, list[Vectors]], *, floor: float) -> None:
        """Start to classify requests by these examples."""
        self._classifier = Classifier(examples, floor=floor)

    async def find(self, query: CacheQuery, timeout_s: float, *, is_dry: bool = False) -> Finding:
        check_query(query)
        named = self._policy.category(query.category)
        exact = await self._equal(query) if query.exact_key else None
        view = ReuseView(
            category=exact.shelf.partition.category if exact is not None else named.name,
            text=query.text,
            max_age_s=query.max_age_s,
            exact=exact.candidate() if exact is not None else None,
            searched_exact=bool(query.exact_key),
        )
        decision = self._policy.choose(view, self._clock.now())
        if decision.serves:
            return Finding(category=view.category, decision=decision, document=exact)
        asked = spelt(query)
        is_named = bool(query.category) or not self._classifies
        if is_named and self._is_suspended(named, is_dry=is_dry):
            return Finding(category=named.name, decision=_unpaid(decision), document=None)
        placed = await self.place(asked, timeout_s)
        policy = self._policy.category(placed.category)
        if not is_named and self._is_suspended(policy, is_dry=is_dry):
            return Finding(category=policy.name, decision=_unpaid(decision), document=None)
        if policy.mode is not ReuseMode.SEMANTIC or placed.vector is None:
            if policy.mode is ReuseMode.OFF:
                decision = self._policy.choose(ReuseView(category=policy.name), self._clock.now())
            elif placed.why:
                decision = ReuseDecision(outcome=decision.outcome, why=f"{decision.why}; {placed.why}")
            return Finding(category=policy.name, decision=decision, document=None)
        return await self._find_similar(asked, policy, placed.vector)

    def _is_suspended(self, policy: CategoryPolicy, *, is_dry: bool) -> bool:
        """Whether this request skips the semantic tier because its category does not pay for look-ups."""
        account = self._accounts[policy.name].break_even
        if policy.mode is not ReuseMode.SEMANTIC or not account.is_suspended:
            return False
        return is_dry or not account.can_look_up()

    async def _find_similar(self, query: CacheQuery, policy: CategoryPolicy, vector: Vectors) -> Finding:
        k = max(self._limits.neighbours, NEIGHBOURS) if policy.model is not None else self._limits.neighbours
        found = await self._store.nearest(shelf_of(query, policy), vector, k)
        least = policy.least_similarity
        # Whether neighbours agree is seen in their answers: a model needs them all, if it needs any.
        is_near = policy.model is not None and any(similarity >= least for _, similarity in found)
        documents = await self._library.fetch([held.label for held, s in found if is_near or s >= least])
        account, now = self._accounts[policy.name], self._clock.now()
        nearest = tuple(
            self._candidate(account.bounds, documents[held.label], similarity)
            if held.label in documents
            else Candidate(entry=held.id, text="", stored_at=held.stored_at, similarity=similarity)
            for held, similarity in found
            if held.label in documents or not (is_near or similarity >= least)
        )
        view = ReuseView(
            category=policy.name,
            text=query.text,
            max_age_s=query.max_age_s,
            nearest=nearest,
            searched_exact=bool(query.exact_key),
            searched_semantic=True,
            degree=self._accounts.degree(policy.name, query.model, query.load, now),
            draw=self._rng.random(),
        )
        decision = self._policy.choose(view, now)
        if decision.explored:
            answer = next(c.answer for c in nearest if c.entry == decision.entry)
            self._explored[request_key(query)] = (decision.entry, decision.similarity, answer)
            while len(self._explored) > EXPLORED_MAX:
                self._explored.popitem(last=False)
        served = next((d for d in documents.values() if decision.serves and d.id == decision.entry), None)
        return Finding(category=policy.name, decision=decision, document=served, text=query.text)

    def _candidate(self, bounds: EntryBounds | None, document: Document, similarity: float) -> Candidate:
        candidate = document.candidate(similarity)
        return candidate if bounds is None else replace(candidate, explore=bounds.explore(document.id, similarity))

    def explored_same(self, policy: CategoryPolicy, query: CacheQuery, text: str) -> str:
        """Learn from an answer that an entry's error bound had asked for; names the entry when it agrees."""
        found = self._explored.pop(request_key(query), None)
        bounds = self._accounts[policy.name].bounds
        if found is None or bounds is None:
            return ""
        entry, similarity, answer = found
        right = answer_hash(text) == answer
        bounds.observe(entry, similarity, right=right)
        return entry if right else ""

    async def _equal(self, query: CacheQuery) -> Document | None:
        """The document of an equal request, stale or not."""
        scope = _scope(query)
        held = self._store.exact(scope, query.category, query.exact_key)
        document = (await self._library.fetch((held.label,))).get(held.label) if held is not None else None
        return document if document is not None and document.answers(scope, query.category, query.exact_key) else None

    async def place(self, query: CacheQuery, timeout_s: float) -> Placed:
        """Find the category and, if the semantic tier or the classifier needs it, the vector."""
        named = self._policy.category(query.category)
        unnamed = not query.category and self._classifies
        if not query.text or not (unnamed or named.mode is ReuseMode.SEMANTIC):
            return Placed(category=named.name)
        if not self._embedder.ready or (unnamed and self._classifier is None):
            self._metrics.unencoded("not_ready")
            why = self._embedder.unready_why or "the categories are still being learnt"
            return Placed(category=named.name, why=why)
        try:
            budget_s = min(self._limits.encode_s, 0.8 * timeout_s)
            encoded = await self._embedder.one(query.tenant, query.text, timeout_s=budget_s)
        except CoveyError as error:  # the request goes on without the cache, whatever ails the encoder
            self._metrics.unencoded("late")
            return Placed(category=named.name, why=f"the encoder gave no vector: {error.message}")
        if encoded.vector is None:
            self._metrics.unencoded("too_long")
            return Placed(category=named.name, why=f"the text of {encoded.tokens} tokens is too long for the encoder")
        if unnamed and self._classifier is not None:
            return Placed(category=self._classifier.classify(encoded.vector), vector=encoded.vector)
        return Placed(category=named.name, vector=encoded.vector)


def check_query(query: CacheQuery) -> None:
    if not query.tenant:
        raise InvalidArgument("a query needs its tenant", field="tenant")
    if not query.model:
        raise InvalidArgument("a query needs its model", field="model")


def _scope(query: CacheQuery) -> Scope:
    return Scope(query.tenant, query.model)


def _unpaid(decision: ReuseDecision) -> ReuseDecision:
    why = "its category's look-ups cost more than its hits save: equal requests only, for now"
    return ReuseDecision(outcome=decision.outcome, why=f"{decision.why}; {why}")


def shelf_of(query: CacheQuery, policy: CategoryPolicy) -> Shelf:
    """Where entries for a spelt-out query are; only a learnt decision may cross from one dialogue to another."""
    scope = _scope(query) if policy.scope is ReuseScope.MODEL else Scope(query.tenant, "")
    is_crossing = policy.model is not None or not query.turns
    return Shelf(Partition(scope, policy.name), query.context_key if is_crossing else history_key(query))


def request_key(query: CacheQuery) -> bytes:
    """What an offer has in common with the look-up that missed."""
    digest = blake2b(digest_size=16, person=b"covey-request")
    for part in (query.tenant.encode(), query.model.encode(), query.context_key, *(t.encode() for t in query.turns)):
        digest.update(len(part).to_bytes(4, "little") + part)
    digest.update(query.text.encode())
    return digest.digest()
