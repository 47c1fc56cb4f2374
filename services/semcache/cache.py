"""The cache's own path: exact key, category, nearest neighbours, decision; and what fills and empties it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from random import Random

from covey.clock import Clock
from covey.errors import CoveyError, InvalidArgument, NoSpace, NotFound
from covey.policy.reuse import Candidate, CategoryPolicy, ReuseDecision, ReuseMode, ReusePolicy, ReuseView
from covey.types.generate import FinishReason
from covey.types.program import CacheOutcome
from covey.types.semcache import (
    CacheExplanation,
    CacheOffer,
    CacheQuery,
    CacheReply,
    CacheStats,
    FeedbackRequest,
    InvalidateReply,
    InvalidateRequest,
    OfferReply,
    Verdict,
)

from .classifier import Classifier
from .encoder import Embedder
from .entry import LABEL_BITS, Document, Partition, Scope, Shelf, pack_ids, size_of
from .library import Filing, Library
from .metrics import CacheMetrics
from .vectors import Vectors

REUSABLE = (FinishReason.STOP, FinishReason.LENGTH)
"""How an answer must have ended to be kept: not in tool calls, whose results change, and not cut off."""


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Placed:
    """The category of a query, and its vector where one is needed and could be had (else `why` not)."""

    category: str
    vector: Vectors | None = None
    why: str = ""


class AnswerCache:
    """Answers look-ups and takes offers; owned by the event loop, all state changes happen between awaits.

    A semantic look-up searches only the shelf of equal tenant, model, category and context key, so no neighbour
    of another partition can hide one of this one. Encoding and the disk run in threads; an index is searched here, in
    about 0.2 ms.
    """

    def __init__(
        self,
        library: Library,
        policy: ReusePolicy,
        embedder: Embedder,
        *,
        classifies: bool,
        limits: CacheLimits,
        metrics: CacheMetrics,
        clock: Clock,
        rng: Random,
    ) -> None:
        """`classifies`: whether unnamed requests are to be classified, by what `learn` will be given."""
        self._library = library
        self._store = library.store
        self._policy = policy
        self._embedder = embedder
        self._classifies = classifies
        self._classifier: Classifier | None = None
        self._limits = limits
        self._metrics = metrics
        self._clock = clock
        self._rng = rng
        self._served: dict[CacheOutcome, int] = dict.fromkeys(CacheOutcome, 0)

    def learn(self, examples: Mapping[str, list[Vectors]], *, floor: float) -> None:
        """Start to classify requests by these examples."""
        self._classifier = Classifier(examples, floor=floor)

    async def lookup(self, query: CacheQuery, *, timeout_s: float) -> CacheReply:
        """Return the answer that may stand for a new one, if there is any.

        Never waits longer than the encoder's share of `timeout_s`: late is a miss. Raises `InvalidArgument`.
        """
        began = self._clock.now()
        finding = await self._find(query, timeout_s)
        now = self._clock.now()
        outcome = finding.decision.outcome
        self._served[outcome] += 1
        self._metrics.lookup(outcome, finding.category, now - began)
        if finding.document is None:
            return CacheReply(outcome=outcome, category=finding.category, similarity=finding.decision.similarity)
        self._store.touch(finding.document.label, now)
        return CacheReply(
            outcome=outcome,
            category=finding.category,
            similarity=finding.decision.similarity,
            answer=finding.document.replay(now),
        )

    async def explain(self, query: CacheQuery, *, timeout_s: float) -> CacheExplanation:
        """Say what `lookup` would do now and why; counts and touches nothing."""
        finding = await self._find(query, timeout_s)
        policy = self._policy.category(finding.category)
        return CacheExplanation(
            category=policy.name,
            mode=policy.mode.value,
            threshold=policy.tau,
            ttl_s=policy.ttl_s,
            similarity=finding.decision.similarity,
            entry=finding.decision.entry,
            why=finding.decision.why,
        )

    async def offer(self, offer: CacheOffer, *, timeout_s: float) -> OfferReply:
        """Keep an answer if its category's policy wants it; raises `InvalidArgument`."""
        _check(offer.query)
        token_ids = pack_ids(offer.ids)
        placed = await self._place(offer.query, timeout_s)
        policy = self._policy.category(placed.category)
        vector = placed.vector if policy.mode is ReuseMode.SEMANTIC else None
        size_bytes = size_of(offer, len(vector) if vector is not None else 0)
        why = self._refusal(offer, policy, placed, size_bytes)
        self._metrics.offer(stored=not why, category=policy.name)
        if why:
            return OfferReply(stored=False, why=why)
        now = self._clock.now()
        document = Document(
            label=self._rng.getrandbits(LABEL_BITS),
            shelf=Shelf(_partition(offer.query, policy.name), offer.query.context_key),
            asked_category=offer.query.category,
            exact_key=offer.query.exact_key,
            text=offer.query.text,
            answer=offer.text,
            token_ids=token_ids,
            reason=offer.reason,
            prompt_tokens=offer.prompt_tokens,
            completion_tokens=offer.completion_tokens,
            stored_at=now,
            expires_at=now + policy.ttl_s,
            size_bytes=size_bytes,
            tags=offer.tags,
            vector=vector.astype("<f4").tobytes() if vector is not None else b"",
            encoder=self._library.encoder if vector is not None else "",
        )
        try:
            filed = await self._library.put(
                [Filing(document=document, vector=vector, quota_entries=policy.quota_entries)]
            )
        except NoSpace as error:
            return OfferReply(stored=False, why=error.message)
        except ValueError as error:
            return OfferReply(stored=False, why=f"the text cannot be indexed: {error}")
        (gone,) = filed
        if gone is None:
            return OfferReply(stored=False, why="the tenant's entries were invalidated meanwhile")
        self._metrics.removed(len(gone), "evicted")
        return OfferReply(stored=True, entry=document.id)

    async def feedback(self, request: FeedbackRequest) -> None:
        """Take a verdict on a served answer: a wrong or stale one goes at once. Raises `NotFound`."""
        entry = self._store.get(request.tenant, request.entry)
        if entry is None:
            raise NotFound("there is no such entry (any more)", field="entry")
        if request.verdict is not Verdict.RIGHT:
            await self._library.remove((entry.label,))
            self._metrics.removed(1, request.verdict.value.lower())

    async def invalidate(self, request: InvalidateRequest) -> InvalidateReply:
        """Remove a tenant's entries, all or those that match every field that is set."""
        if not request.tenant:
            raise InvalidArgument("name the tenant whose entries are to go", field="tenant")
        matching = self._store.matching(request.tenant, model=request.model, category=request.category)
        doomed = [entry for entry in matching if request.entry in ("", entry.id)]
        await self._library.remove([entry.label for entry in doomed])
        if not (request.model or request.category or request.entry):
            self._embedder.forget(request.tenant)
        self._metrics.removed(len(doomed), "invalidated")
        return InvalidateReply(removed=len(doomed))

    def stats(self) -> CacheStats:
        """Return totals since the start."""
        return CacheStats(
            entries=len(self._store),
            size_bytes=self._store.size_bytes,
            exact_hits=self._served[CacheOutcome.EXACT],
            semantic_hits=self._served[CacheOutcome.SEMANTIC],
            misses=self._served[CacheOutcome.MISS],
            encoder_ready=self._embedder.ready,
        )

    async def _find(self, query: CacheQuery, timeout_s: float) -> Finding:
        _check(query)
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
        placed = await self._place(query, timeout_s)
        policy = self._policy.category(placed.category)
        if policy.mode is not ReuseMode.SEMANTIC or placed.vector is None:
            if policy.mode is ReuseMode.OFF:
                decision = self._policy.choose(ReuseView(category=policy.name), self._clock.now())
            elif placed.why:
                decision = ReuseDecision(outcome=decision.outcome, why=f"{decision.why}; {placed.why}")
            return Finding(category=policy.name, decision=decision, document=None)
        return await self._find_similar(query, policy, placed.vector)

    async def _find_similar(self, query: CacheQuery, policy: CategoryPolicy, vector: Vectors) -> Finding:
        shelf = Shelf(_partition(query, policy.name), query.context_key)
        found = await self._store.nearest(shelf, vector, self._limits.neighbours)
        documents = await self._library.fetch([held.label for held, similarity in found if similarity >= policy.tau])
        nearest = tuple(
            documents[held.label].candidate(similarity)
            if held.label in documents
            else Candidate(entry=held.id, text="", stored_at=held.stored_at, similarity=similarity)
            for held, similarity in found
            if similarity < policy.tau or held.label in documents
        )
        view = ReuseView(
            category=policy.name,
            text=query.text,
            max_age_s=query.max_age_s,
            nearest=nearest,
            searched_exact=bool(query.exact_key),
            searched_semantic=True,
        )
        decision = self._policy.choose(view, self._clock.now())
        served = next((d for d in documents.values() if decision.serves and d.id == decision.entry), None)
        return Finding(category=policy.name, decision=decision, document=served)

    async def _equal(self, query: CacheQuery) -> Document | None:
        """The document of an equal request, stale or not."""
        scope = _scope(query)
        held = self._store.exact(scope, query.category, query.exact_key)
        document = (await self._library.fetch((held.label,))).get(held.label) if held is not None else None
        return document if document is not None and document.answers(scope, query.category, query.exact_key) else None

    async def _place(self, query: CacheQuery, timeout_s: float) -> Placed:
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

    def _refusal(self, offer: CacheOffer, policy: CategoryPolicy, placed: Placed, size_bytes: int) -> str:
        semantic = policy.mode is ReuseMode.SEMANTIC and placed.vector is not None
        if policy.mode is ReuseMode.OFF or policy.quota_entries == 0:
            return f"category {policy.name} keeps nothing"
        if offer.reason not in REUSABLE:
            return f"answers that end in {offer.reason.value} are not kept"
        if not (offer.text or offer.ids):
            return "the answer is empty"
        if size_bytes > self._limits.entry_size_bytes_max:
            return f"an entry of {size_bytes} bytes is over the limit of {self._limits.entry_size_bytes_max}"
        if not (offer.query.exact_key or semantic):
            return placed.why or f"category {policy.name} reuses equal requests only, and this one has no exact key"
        return ""


def _check(query: CacheQuery) -> None:
    if not query.tenant:
        raise InvalidArgument("a query needs its tenant", field="tenant")
    if not query.model:
        raise InvalidArgument("a query needs its model", field="model")


def _scope(query: CacheQuery) -> Scope:
    return Scope(query.tenant, query.model)


def _partition(query: CacheQuery, category: str) -> Partition:
    return Partition(_scope(query), category)
