"""semcache as the gateway uses it: look-ups under a short deadline that never fail a request, and offers."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import astuple, dataclass, replace
from hashlib import blake2b

import msgspec

from covey.clock import Clock
from covey.codec.methods import SemCache
from covey.errors import CoveyError, InvalidArgument
from covey.net.rpc import Channels
from covey.policy.dialogue import spell_out
from covey.retry import Breaker
from covey.types.generate import FinishReason, Role, Sampling
from covey.types.program import CacheMode, CacheOutcome, Delta, Message
from covey.types.semcache import (
    TURNS_MAX,
    VALUE_CHARS_MAX,
    AbandonRequest,
    CachedAnswer,
    CacheOffer,
    CacheQuery,
    CacheReply,
)

from .errands import Errands
from .fleet import Fleet
from .job import Job, Prompt

log = logging.getLogger(__name__)

SEMANTIC_CHARS_MAX = 65_536
QUEUE_OBJECTIVE_S = 1.0
"""A request that waits so long for its turn counts as a load of 1."""
JOIN_S = 0.01
"""A request leads the flight of its equals at once, or learns after so long that another one does."""
PIECE_CHARS = 64
"""A cached answer is streamed in pieces of this many characters."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cached:
    """An answer from semcache and how it was found."""

    outcome: CacheOutcome
    answer: CachedAnswer


@dataclass(frozen=True, slots=True, kw_only=True)
class Missed:
    """No answer: `outcome` is OFF when semcache did not say in time. With a `flight` others wait for this request's."""

    outcome: CacheOutcome
    flight: str = ""


def query_for(
    job: Job,
    prompt: Prompt,
    token_ids: tuple[int, ...],
    sampling: Sampling,
    *,
    grammar: str = "",
    model: str,
    revision: str,
    seeded: bool,
    waited_s: float = 0.0,
) -> CacheQuery | None:
    """What to look for, or None when this request's answer cannot be kept. `model` is what serves it: a job may
    name none. `waited_s` is how long it has waited for its turn: thresholds may relax with it.

    The exact key covers model, tokens and all that shapes the answer, and exists when the answer is determined: greedy
    or with the caller's seed. The context key covers the same without the last user turn and the seed; in a dialogue
    whose last turn the user's earlier ones explain, also without these and the answers to them: they go as `turns`.
    """
    if sampling.logprobs is not None:
        return None  # kept answers have none
    biases = sorted(sampling.logit_bias.items())
    shape = (model, revision, job.params.stop, grammar, biases, astuple(replace(sampling, seed=0, logit_bias={})))
    exact = b""
    if sampling.temperature == 0:
        exact = _key("exact", shape, token_ids)
    elif seeded:
        exact = _key("exact", shape, token_ids, sampling.seed)
    is_free = not grammar and not prompt.tools and not job.shown  # else the last turn does not say all that was asked
    text, context, turns = _last_turn(prompt.messages) if is_free else ("", (), ())
    if not exact and not text:
        return None
    # Without a limit of the caller's own, what the context leaves is one: it differs with every length of prompt.
    asked = (*shape[:-1], job.params.max_tokens, astuple(replace(sampling, seed=0, logit_bias={}, max_tokens=1)))
    return CacheQuery(
        tenant=job.tenant,
        model=model,
        exact_key=exact,
        context_key=_key("context", asked, context) if text else b"",
        text=text,
        turns=turns,
        load=waited_s / QUEUE_OBJECTIVE_S,
        max_age_s=job.max_age_s,
    )


class _Tier:
    """How long one kind of look-up may take, and whether it is tried at all."""

    def __init__(self, deadline_s: float) -> None:
        self.deadline_s = deadline_s
        self.breaker = Breaker(failures=3, open_s=5.0)


class Answers:
    """Finds and offers answers; when semcache is slow or gone there simply is no cache for a while."""

    def __init__(
        self,
        channels: Channels,
        fleet: Fleet,
        clock: Clock,
        errands: Errands,
        *,
        exact_deadline_s: float,
        semantic_deadline_s: float,
        flight_wait_s: float,
    ) -> None:
        self._channels = channels
        self._fleet = fleet
        self._clock = clock
        self._errands = errands
        # A breaker each: an encoder that is late must not take the exact tier away.
        self._exact = _Tier(exact_deadline_s)
        self._semantic = _Tier(semantic_deadline_s)
        self._flight_wait_s = flight_wait_s

    async def exact(self, query: CacheQuery, *, deadline_at: float, can_lead: bool) -> Cached | Missed:
        """The answer to exactly this request; of equal ones that miss together one leads and the others wait for it.

        Who `can_lead` must end its flight by `offer` or `abandon`. Nobody waits past half of what is left of its time.
        """
        if not query.exact_key:
            return Missed(outcome=CacheOutcome.MISS)
        asked = replace(query, text="", context_key=b"")
        wait_s = min(self._flight_wait_s, (deadline_at - self._clock.now()) / 2) if can_lead else 0.0
        found = await self._lookup(replace(asked, wait_s=max(0.0, min(wait_s, JOIN_S))), self._exact)
        if isinstance(found, Cached) or found.outcome is CacheOutcome.OFF or found.flight or wait_s <= JOIN_S:
            return found
        # Somebody else is at it. Only now wait long: a semcache that hangs must not hold every request up.
        return await self._lookup(replace(asked, wait_s=wait_s), self._exact, wait_s=wait_s)

    async def semantic(self, query: CacheQuery) -> Cached | Missed:
        """The answer to a request that means the same."""
        if not query.text:
            return Missed(outcome=CacheOutcome.MISS)
        return await self._lookup(replace(query, exact_key=b""), self._semantic)

    def offer(
        self,
        query: CacheQuery,
        text: str,
        ids: tuple[int, ...],
        reason: FinishReason,
        prompt_tokens: int,
        *,
        flight: str = "",
        shown: tuple[str, ...] = (),
    ) -> None:
        """Let semcache keep a finished answer and hand it to those who wait for it, in the background.

        `shown` are the entries that the model was shown as examples.
        """
        address = self._fleet.service(Role.SEMCACHE)
        if address is None or not text or len(text) > VALUE_CHARS_MAX:
            self.abandon(query, flight)
            return
        offer = CacheOffer(
            query=query,
            text=text,
            ids=ids,
            reason=reason,
            prompt_tokens=prompt_tokens,
            completion_tokens=len(ids),
            flight=flight,
            examples=shown,
        )
        channel = self._channels.to(address)
        self._errands.run(lambda: channel.call(SemCache.OFFER, offer, timeout_s=5.0), "offer")

    def abandon(self, query: CacheQuery, flight: str) -> None:
        """Let those who wait for this request's answer go on without it, in the background."""
        address = self._fleet.service(Role.SEMCACHE) if flight else None
        if address is not None:
            request = AbandonRequest(tenant=query.tenant, flight=flight)
            channel = self._channels.to(address)
            self._errands.run(lambda: channel.call(SemCache.ABANDON, request, timeout_s=5.0), "abandon")

    async def _lookup(self, query: CacheQuery, tier: _Tier, *, wait_s: float = 0.0) -> Cached | Missed:
        address = self._fleet.service(Role.SEMCACHE)
        attempt = tier.breaker.attempt(self._clock.now()) if address else None
        if address is None or attempt is None:
            return Missed(outcome=CacheOutcome.OFF)
        timeout_s = tier.deadline_s + wait_s
        try:
            reply: CacheReply = await self._channels.to(address).call(SemCache.LOOKUP, query, timeout_s=timeout_s)
        except CoveyError as error:
            log.warning("look-up failed code=%s", error.code)
            if isinstance(error, InvalidArgument):
                tier.breaker.cancel(attempt)  # one odd query says nothing about semcache
            else:
                tier.breaker.fail(attempt, self._clock.now())
            return Missed(outcome=CacheOutcome.OFF)
        except BaseException:
            tier.breaker.cancel(attempt)
            raise
        tier.breaker.succeed(attempt)
        if reply.answer is None or reply.outcome not in (CacheOutcome.EXACT, CacheOutcome.SEMANTIC):
            return Missed(outcome=CacheOutcome.MISS, flight=reply.flight)
        return Cached(outcome=reply.outcome, answer=reply.answer)


def can_read(mode: CacheMode) -> bool:
    return mode in (CacheMode.USE, CacheMode.NO_STORE)


def can_fill(mode: CacheMode) -> bool:
    return mode in (CacheMode.USE, CacheMode.REFRESH)


def pieces(index: int, answer: CachedAnswer) -> Iterator[Delta]:
    """A kept answer as the deltas of a stream; its tokens come with the last."""
    starts = range(0, len(answer.text), PIECE_CHARS)
    for start in starts:
        is_last = start + PIECE_CHARS >= len(answer.text)
        yield Delta(index=index, text=answer.text[start : start + PIECE_CHARS], ids=answer.ids if is_last else ())


def _last_turn(messages: tuple[Message, ...]) -> tuple[str, tuple[tuple[str, str], ...], tuple[str, ...]]:
    """The last user turn, the context that it needs as it is, and the user's turns before it that explain it.

    No text when the conversation does not end with a short user turn.
    """
    if not messages or messages[-1].role != "user" or len(messages[-1].content) > SEMANTIC_CHARS_MAX:
        return "", (), ()
    text, before = messages[-1].content, messages[:-1]
    whole = tuple((m.role, m.content) for m in before)
    said = tuple(m.content for m in before if m.role == "user")
    if not said or len(said) > TURNS_MAX or sum(map(len, said)) > SEMANTIC_CHARS_MAX:
        return text, whole, ()
    if not spell_out(text, said).resolved:
        return text, whole, ()
    rest = tuple((m.role, m.content) for m in before if m.role not in ("user", "assistant"))
    return text, rest, said


def _key(kind: str, *parts: object) -> bytes:
    return blake2b(msgspec.msgpack.encode((kind, *parts)), digest_size=16, person=b"covey-answer").digest()
