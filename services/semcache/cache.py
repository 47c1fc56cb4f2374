"""The cache's own path: exact key, category, nearest neighbours, decision; and what fills and empties it."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from random import Random

from covey.clock import Clock
from covey.errors import NoSpace, NotFound
from covey.policy.reuse import CategoryPolicy, ReuseMode, ReusePolicy
from covey.types.generate import FinishReason
from covey.types.program import CacheOutcome
from covey.types.semcache import (
    CacheExplanation,
    CacheOffer,
    CacheQuery,
    CacheReply,
    CacheStats,
    FeedbackRequest,
    OfferReply,
    Verdict,
)

from .accounts import Accounts, AccountsConfig
from .encoder import Embedder
from .entry import LABEL_BITS, Document, pack_ids, size_of
from .finder import CacheLimits, Finder, Finding, Placed, check_query, request_key, shelf_of
from .library import Filing, Library
from .metrics import CacheMetrics
from .rewrite import spelt
from .shadow import Sample, Sampled
from .vectors import Vectors

log = logging.getLogger(__name__)

REUSABLE = (FinishReason.STOP, FinishReason.LENGTH)
"""How an answer must have ended to be kept: not in tool calls, whose results change, and not cut off."""


class AnswerCache:
    """Answers look-ups and takes offers; owned by the event loop, all state changes happen between awaits.

    Encoding and the disk run in threads; an index is searched here, in about 0.2 ms.
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
        accounts: AccountsConfig | None = None,
        sample: Sample | None = None,
    ) -> None:
        """`classifies`: whether unnamed requests are to be classified, by what `learn` will be given.

        `sample` takes the semantic hits that are to be judged; without it only users' verdicts are counted.
        """
        self._library = library
        self._store = library.store
        self._policy = policy
        self._embedder = embedder
        self._limits = limits
        self._metrics = metrics
        self._clock = clock
        self._rng = rng
        self._served: dict[CacheOutcome, int] = dict.fromkeys(CacheOutcome, 0)
        self._accounts = Accounts(policy.categories.values(), accounts or AccountsConfig(), rng)
        self._sample = sample
        self._finder = Finder(
            library,
            policy,
            embedder,
            self._accounts,
            classifies=classifies,
            limits=limits,
            metrics=metrics,
            clock=clock,
            rng=rng,
        )

    @property
    def accounts(self) -> Accounts:
        """What each category has done so far."""
        return self._accounts

    def learn(self, examples: Mapping[str, list[Vectors]], *, floor: float) -> None:
        """Start to classify requests by these examples."""
        self._finder.learn(examples, floor=floor)

    async def lookup(self, query: CacheQuery, *, timeout_s: float) -> CacheReply:
        """Return the answer that may stand for a new one, if there is any.

        Never waits longer than the encoder's share of `timeout_s`: late is a miss. Raises `InvalidArgument`.
        """
        began = self._clock.now()
        finding = await self._finder.find(query, timeout_s)
        now = self._clock.now()
        outcome = finding.decision.outcome
        self._served[outcome] += 1
        self._metrics.lookup(outcome, finding.category, now - began)
        self._account(query, finding, now - began, now)
        if finding.document is None:
            return CacheReply(outcome=outcome, category=finding.category, similarity=finding.decision.similarity)
        self._store.touch(finding.document.label, now)
        return CacheReply(
            outcome=outcome,
            category=finding.category,
            similarity=finding.decision.similarity,
            answer=finding.document.replay(now),
            relaxed=finding.decision.relaxed,
        )

    def _account(self, query: CacheQuery, finding: Finding, overhead_s: float, now: float) -> None:
        """Count a look-up, and let a sampled semantic hit be judged."""
        account, decision = self._accounts[finding.category], finding.decision
        account.lookups += 1
        if not finding.text:  # no semantic look-up
            return
        hit = decision.outcome is CacheOutcome.SEMANTIC
        self._accounts.looked_up(finding.category, request_key(query), hit=hit, overhead_s=overhead_s, now=now)
        self._metrics.suspended(finding.category, is_suspended=account.break_even.is_suspended)
        if finding.document is None:
            return
        if decision.relaxed:
            self._metrics.relaxed(finding.category)
            log.info("only load allowed a hit category=%s %s", finding.category, decision.why)
        entry = finding.document
        is_sampled = self._accounts.served(finding.category, entry.id, decision.similarity, relaxed=decision.relaxed)
        if is_sampled and self._sample is not None:
            self._sample(
                Sampled(
                    category=finding.category,
                    entry=entry.id,
                    asked=finding.text,
                    stored=entry.text,
                    answer=entry.answer,
                    tenant=query.tenant,
                )
            )

    def judged(self, sampled: Sampled, *, right: bool) -> None:
        """Take the judge's verdict on a sampled hit: it moves the estimate, and removes nothing."""
        self._accounts.verdict(sampled.category, sampled.entry, wrong=not right)
        self._metrics.judged(sampled.category, self._accounts[sampled.category].estimate())

    async def explain(self, query: CacheQuery, *, timeout_s: float) -> CacheExplanation:
        """Say what `lookup` would do now and why; counts and touches nothing."""
        finding = await self._finder.find(query, timeout_s, is_dry=True)
        policy = self._policy.category(finding.category)
        return CacheExplanation(
            category=policy.name,
            mode=self._accounts[policy.name].mode.value,
            threshold=policy.model.cut if policy.model is not None else policy.tau,
            ttl_s=policy.ttl_s,
            similarity=finding.decision.similarity,
            entry=finding.decision.entry,
            why=finding.decision.why,
        )

    async def offer(self, offer: CacheOffer, *, timeout_s: float, age_s: float = 0.0) -> OfferReply:
        """Keep an answer if its category's policy wants it and it is not too old; raises `InvalidArgument`."""
        check_query(offer.query)
        token_ids = pack_ids(offer.ids)
        query = spelt(offer.query)
        placed = await self._finder.place(query, timeout_s)
        policy = self._policy.category(placed.category)
        self._accounts.answered(policy.name, request_key(offer.query), self._clock.now())
        if same := self._finder.explored_same(policy, query, offer.text):
            return OfferReply(stored=False, why=f"entry {same} gives the same answer, and gained by it")
        vector = placed.vector if policy.mode is ReuseMode.SEMANTIC else None
        size_bytes = size_of(offer, len(vector) if vector is not None else 0)
        why = self._refusal(offer, policy, placed, size_bytes)
        self._metrics.offer(stored=not why, category=policy.name)
        if why:
            return OfferReply(stored=False, why=why)
        if age_s >= policy.ttl_s:
            return OfferReply(stored=False, why=f"the answer is older than the {policy.ttl_s:g} s of its category")
        now = self._clock.now() - age_s
        document = Document(
            label=self._rng.getrandbits(LABEL_BITS),
            shelf=shelf_of(query, policy),
            asked_category=offer.query.category,
            exact_key=offer.query.exact_key,
            text=query.text,
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
                [
                    Filing(
                        document=document,
                        vector=vector,
                        quota_entries=policy.quota_entries,
                        quota_bytes=policy.quota_bytes,
                    )
                ]
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
        if category := self._accounts.was_served(request.entry):
            wrong, stale = request.verdict is Verdict.WRONG, request.verdict is Verdict.STALE
            self._accounts.verdict(category, request.entry, wrong=wrong, stale=stale)
            self._metrics.judged(category, self._accounts[category].estimate())
        if request.verdict is not Verdict.RIGHT:
            await self._library.remove((entry.label,))
            self._metrics.removed(1, request.verdict.value.lower())

    def stats(self) -> CacheStats:
        """Return totals since the start."""
        return CacheStats(
            entries=len(self._store),
            size_bytes=self._store.size_bytes,
            exact_hits=self._served[CacheOutcome.EXACT],
            semantic_hits=self._served[CacheOutcome.SEMANTIC],
            misses=self._served[CacheOutcome.MISS],
            encoder_ready=self._embedder.ready,
            categories=self._accounts.stats(self._by_category()),
        )

    def _by_category(self) -> dict[str, tuple[int, int]]:
        """Entries and bytes of each category."""
        sums: dict[str, tuple[int, int]] = {}
        for partition, entries, size_bytes in self._store.holdings():
            before = sums.get(partition.category, (0, 0))
            sums[partition.category] = (before[0] + entries, before[1] + size_bytes)
        return sums

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
