"""One choice of a request: from the cache when it is there, else generated, then offered, its blocks pinned."""

from __future__ import annotations

import logging
import secrets
from dataclasses import replace

import anyio

from covey.clock import Clock
from covey.codec.methods import Decode
from covey.errors import CoveyError, InvalidArgument
from covey.net.rpc import Channels
from covey.policy.pinning import PinPolicy
from covey.types.generate import Finished, FinishReason, RetainRequest, Role, Timings, Usage
from covey.types.program import CacheMode, CacheOutcome, Delta
from covey.types.semcache import CacheQuery

from .answers import Answers, Cached, Missed, can_fill, can_read, pieces, query_for
from .dispatch import Dispatcher, Sequence
from .fleet import Fleet, Target
from .job import Job, Outcome, add_timings
from .metrics import Metrics
from .models import LocalModel
from .plan import Planned
from .relay import Relay
from .stream import Completion
from .tools.parser import CallParser

log = logging.getLogger(__name__)

RETAIN_TIMEOUT_S = 1.0
"""The worker's grace lease ends after a second: a later word is too late."""


class Answering:
    """Decides between cache and workers for each choice. Shared by all requests."""

    def __init__(
        self,
        *,
        dispatcher: Dispatcher,
        answers: Answers,
        pins: PinPolicy,
        fleet: Fleet,
        channels: Channels,
        metrics: Metrics,
        clock: Clock,
    ) -> None:
        self._dispatcher = dispatcher
        self._answers = answers
        self._pins = pins
        self._fleet = fleet
        self._channels = channels
        self._metrics = metrics
        self._clock = clock

    async def answer(self, completion: Completion, model: LocalModel, planned: Planned, began: float) -> Outcome:
        """Put all deltas of one choice into the completion's pipe; `began` is when the request arrived."""
        choice = _Choice(self, completion, model, planned, began)
        query = choice.query(self._fleet.revision(model.name))
        try:
            outcome = await self._from_cache_or_workers(choice, query)
            is_new = outcome.cache not in (CacheOutcome.EXACT, CacheOutcome.SEMANTIC)
            is_whole = outcome.reason in (FinishReason.STOP, FinishReason.LENGTH)
            if query is not None and is_new and is_whole and can_fill(completion.job.cache):
                relay, flight = choice.relay, choice.take_flight()
                prompt_tokens = outcome.usage.prompt_tokens
                self._answers.offer(
                    query,
                    relay.text,
                    relay.ids,
                    outcome.reason,
                    prompt_tokens,
                    flight=flight,
                    shown=completion.job.shown,
                )
        finally:
            if query is not None:  # refused, failed, cut off, or answered by something similar after all
                self._answers.abandon(query, choice.take_flight())
        return replace(outcome, reason=choice.finish(outcome.reason))

    async def _from_cache_or_workers(self, choice: _Choice, query: CacheQuery | None) -> Outcome:
        mode = choice.job.cache
        if mode is CacheMode.BYPASS or not can_read(mode):
            return await self._generate(choice, CacheOutcome.BYPASS)
        if query is None:
            return await self._generate(choice, CacheOutcome.OFF)
        began = self._clock.now()
        deadline_at = choice.job.deadline_at
        found = await self._answers.exact(query, deadline_at=deadline_at, can_lead=mode is CacheMode.USE)
        choice.lookup_s = self._clock.now() - began
        if isinstance(found, Cached):
            return await choice.replay(found)
        choice.flight = found.flight
        if found.outcome is CacheOutcome.OFF or not query.text:
            return await self._generate(choice, found.outcome)
        return await self._race(choice, query)

    async def _race(self, choice: _Choice, query: CacheQuery) -> Outcome:
        """Generate while the nearest neighbours are looked up; a hit before the first token wins."""
        found: Cached | Missed = Missed(outcome=CacheOutcome.OFF)
        outcome: Outcome | None = None
        generation = anyio.CancelScope()
        choice.decided = decided = anyio.Event()

        async def look() -> None:
            nonlocal found
            began = self._clock.now()
            found = await self._answers.semantic(query)
            choice.lookup_s += self._clock.now() - began
            if isinstance(found, Cached) and not choice.emitted:
                generation.cancel()
            elif not isinstance(found, Cached):
                choice.set_cache(found.outcome)
            decided.set()

        async with anyio.create_task_group() as tg:
            tg.start_soon(look)
            with generation:
                outcome = await self._generate(choice, CacheOutcome.MISS)
            tg.cancel_scope.cancel()
        if outcome is not None:
            return outcome
        assert isinstance(found, Cached)
        return await choice.replay(found)

    async def _generate(self, choice: _Choice, cache: CacheOutcome) -> Outcome:
        choice.set_cache(cache)
        seq = choice.sequence()
        try:
            finished, target = await self._dispatcher.run(seq)
        except InvalidArgument as error:
            field = "response_format" if choice.job.params.grammar else "tools"
            is_ours = choice.job.params.grammar or choice.job.tooling is not None
            if not is_ours or not (error.field or "").startswith("grammar"):
                raise
            raise InvalidArgument(error.message, field=field) from error
        pinned = await self._pin(choice.job, finished, target)
        used = seq.usage or finished.usage
        return Outcome(
            reason=finished.reason,
            usage=Usage(
                prompt_tokens=len(seq.request.token_ids),
                completion_tokens=seq.relay.tokens,
                cached_tokens=used.cached_tokens,
                loaded_tokens=used.loaded_tokens,
                blocks_moved=seq.blocks_moved,
            ),
            timings=add_timings(seq.timings, Timings(lookup_s=choice.lookup_s)),
            cache=choice.cache,
            split=seq.split,
            migrations=seq.migrations,
            worker=target.worker,
            pinned_blocks=pinned,
            text=choice.relay.text,
        )

    async def _pin(self, job: Job, finished: Finished, target: Target) -> int:
        """Tell the worker how long to keep the blocks while a tool runs; without a word it demotes them.

        Returns how many blocks stay pinned.
        """
        pin = self._pins.choose(job.then_tool) if finished.lease and target.role is Role.DECODE else None
        if pin is None or finished.lease is None:
            return 0
        request = RetainRequest(lease=finished.lease, ttl_s=pin.ttl_s, then=pin.then, program_id=job.program_id)
        try:
            kept = await self._channels.to(target.address).call(Decode.RETAIN, request, timeout_s=RETAIN_TIMEOUT_S)
        except CoveyError as error:
            log.info("pin refused worker=%s code=%s", target.worker, error.code)
            self._metrics.pins.labels("refused").inc()
            return 0
        self._metrics.pins.labels("kept").inc()
        return kept.blocks


class _Choice:
    """The state of one choice while it is answered."""

    def __init__(
        self, answering: Answering, completion: Completion, model: LocalModel, planned: Planned, began: float
    ) -> None:
        self._metrics = answering._metrics  # noqa: SLF001 - one module, one concept
        self._clock = answering._clock  # noqa: SLF001
        self._completion = completion
        self._model = model
        self._planned = planned
        self._last_at = began
        self.job = completion.job
        self.relay = Relay(planned.index)
        self.cache = CacheOutcome.BYPASS
        self.lookup_s = 0.0
        self.flight = ""
        self.emitted = False
        self.decided: anyio.Event | None = None
        self._parser = _parser(self.job, model)

    def query(self, revision: str) -> CacheQuery | None:
        request = self._planned.request
        return query_for(
            self.job,
            self._planned.prompt,
            request.token_ids,
            request.sampling,
            grammar=request.grammar,
            model=self._model.name,
            revision=revision,
            seeded=self.job.params.seed is not None,
            waited_s=max(0.0, self._clock.now() - self._last_at),
        )

    def take_flight(self) -> str:
        """The flight that this choice leads, once: it is ended by whoever takes it."""
        flight, self.flight = self.flight, ""
        return flight

    def set_cache(self, outcome: CacheOutcome) -> None:
        self.cache = outcome
        if self._planned.index == 0:
            self._completion.cache = outcome

    def sequence(self) -> Sequence:
        return Sequence(
            job=self.job,
            request=self._planned.request,
            tokenizer_hash=self._model.tokenizer.hash,
            relay=self.relay,
            on_delta=self._pass_on,
            on_accepted=self._completion.start,
        )

    async def replay(self, found: Cached) -> Outcome:
        """Stream a kept answer as any other; it holds nobody up, so a slow reader is waited for."""
        self.set_cache(found.outcome)
        self._completion.start()
        answer = found.answer
        for delta in pieces(self._planned.index, answer):
            await self._completion.pipe.put_when_room(self._parsed(delta))
        return Outcome(
            reason=answer.reason,
            usage=Usage(prompt_tokens=len(self._planned.request.token_ids), completion_tokens=answer.completion_tokens),
            timings=Timings(lookup_s=self.lookup_s),
            cache=found.outcome,
        )

    async def _pass_on(self, delta: Delta) -> None:
        if not self.emitted:
            if self.decided is not None:
                await self.decided.wait()  # no longer than the look-up's deadline
            self.emitted = True
            self._metrics.ttft_s.labels(self._completion.model).observe(self._clock.now() - self._last_at)
        else:
            self._metrics.itl_s.labels(self._completion.model).observe(self._clock.now() - self._last_at)
        self._last_at = self._clock.now()
        self._completion.pipe.put(self._parsed(delta))

    def finish(self, reason: FinishReason) -> FinishReason:
        """Pass on what was held back, and say how the choice ended."""
        if self._parser is None:
            return reason
        rest = self._parser.finish()
        if rest.text or rest.calls:
            self._completion.pipe.put(Delta(index=self._planned.index, text=rest.text, calls=rest.calls))
        return FinishReason.TOOL_CALLS if self._parser.calls and reason is FinishReason.STOP else reason

    def _parsed(self, delta: Delta) -> Delta:
        if self._parser is None:
            return delta
        parsed = self._parser.push(delta.text)
        return replace(delta, text=parsed.text, calls=parsed.calls)


def _parser(job: Job, model: LocalModel) -> CallParser | None:
    tooling = job.tooling
    if tooling is None:
        return None
    names = {tool.name for tool in tooling.tools}
    return CallParser(model.dialect, names, lambda: f"call_{secrets.token_hex(12)}", several=tooling.parallel)
