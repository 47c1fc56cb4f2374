"""A request from admission to its last event, for both edges and for program calls."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from random import Random

import anyio
from structlog.typing import FilteringBoundLogger

from covey.clock import Clock
from covey.errors import ContextLengthExceeded, CoveyError
from covey.net.tasks import background_tasks
from covey.telemetry import log_context
from covey.types.generate import Timings, Usage
from covey.types.program import ChoiceDone, Completed, Delta

from .answering import Answering
from .gate import Gate
from .in_context import Chosen, InContext
from .job import Job, Outcome, add_timings
from .metrics import Metrics
from .models import Catalog, LocalModel, RemoteModel
from .plan import Planned, plan
from .stream import Completion

Relayed = Callable[[Completion, RemoteModel], Awaitable[Outcome]]
"""How a request to a remote model runs (`remote.RemoteModels.run`)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Ended:
    planned: Planned
    outcome: Outcome


class Completions:
    """Runs jobs. Leaving `open` cancels whatever is left of the job, at the workers too."""

    def __init__(
        self,
        *,
        catalog: Catalog,
        gate: Gate,
        answering: Answering,
        in_context: InContext,
        remote: Relayed,
        metrics: Metrics,
        clock: Clock,
        rng: Random,
        log: FilteringBoundLogger,
        stream_events_max: int,
    ) -> None:
        self._catalog = catalog
        self._gate = gate
        self._answering = answering
        self._in_context = in_context
        self._remote = remote
        self._metrics = metrics
        self._clock = clock
        self._rng = rng
        self._log = log
        self._stream_events_max = stream_events_max

    @asynccontextmanager
    async def open(self, job: Job) -> AsyncIterator[Completion]:
        """Start a job and own it for a block; iterating raises what it failed with. Raises NotFound for the model."""
        chosen = await self._in_context.choose(job)
        job = chosen.job
        model = self._catalog.find(job.model)
        completion = Completion(job, model.name, int(self._clock.wall()), self._stream_events_max)
        ids = {"request_id": job.request_id} | ({"program_id": job.program_id} if job.program_id else {})
        async with background_tasks() as tg:
            with log_context(**ids):
                tg.start_soon(self._produce, completion, model, chosen)
            yield completion

    async def text(self, job: Job) -> str:
        """Run a job and return the text of its first choice. Raises what it failed with."""
        async with self.open(job) as completion:
            pieces = [event.text async for event in completion if isinstance(event, Delta) and event.index == 0]
        return "".join(pieces)

    async def _produce(self, completion: Completion, model: LocalModel | RemoteModel, chosen: Chosen) -> None:
        began = self._clock.now()
        code = "CANCELLED"
        try:
            outcomes = await self._run(completion, model, began, chosen.original)
            self._in_context.finished(chosen, outcomes[0], self.text)
            code = "OK"
            completion.pipe.end()
        except CoveyError as error:
            code = error.code
            completion.pipe.end(error)
        except BaseExceptionGroup as group:
            error_found = first_error(group)
            if not isinstance(error_found, CoveyError):
                raise
            code = error_found.code
            completion.pipe.end(error_found)
        finally:
            self._metrics.requests.labels(model.name, code).inc()
            took_s = self._clock.now() - began
            self._metrics.e2e_s.labels(model.name).observe(took_s)
            self._log.info(
                "request ended", code=code, model=model.name, tenant=completion.job.tenant, took_s=round(took_s, 3)
            )

    async def _run(
        self, completion: Completion, model: LocalModel | RemoteModel, began: float, original: Job
    ) -> tuple[Outcome, ...]:
        job = completion.job
        if isinstance(model, RemoteModel):
            async with self._gate.permit(job.request_id, job.tenant, deadline_at=job.deadline_at):
                outcome = await self._remote(completion, model)
            self._finish(completion, outcome.usage, outcome.timings, (outcome,))
            return (outcome,)
        try:
            planned = await plan(job, model, self._catalog, self._rng)
        except ContextLengthExceeded:
            if not job.shown:
                raise
            completion.job = job = replace(
                job, prompts=original.prompts, shown=()
            )  # examples must never cost an answer
            planned = await plan(job, model, self._catalog, self._rng)
        cost = float(len(planned))
        async with self._gate.permit(job.request_id, job.tenant, deadline_at=job.deadline_at, cost=cost) as waited_s:
            ended = await self._answer_all(completion, model, planned, began)
        outcomes = tuple(e.outcome for e in ended)
        timings = add_timings(_longest(outcomes), Timings(queue_s=waited_s))
        self._finish(completion, _total(ended), timings, outcomes)
        return outcomes

    async def _answer_all(
        self, completion: Completion, model: LocalModel, planned: tuple[Planned, ...], began: float
    ) -> list[_Ended]:
        ended: list[_Ended] = []

        async def answer(one: Planned) -> None:
            outcome = await self._answering.answer(completion, model, one, began)
            completion.pipe.put(ChoiceDone(index=one.index, reason=outcome.reason))
            ended.append(_Ended(planned=one, outcome=outcome))

        if len(planned) == 1:
            await answer(planned[0])
        else:
            async with anyio.create_task_group() as tg:
                for one in planned:
                    tg.start_soon(answer, one)
        return sorted(ended, key=lambda e: e.planned.index)

    def _finish(self, completion: Completion, usage: Usage, timings: Timings, outcomes: tuple[Outcome, ...]) -> None:
        first = outcomes[0]
        completion.cache, completion.worker, completion.pinned_blocks = first.cache, first.worker, first.pinned_blocks
        model = completion.model
        self._gate.spend(completion.job.tenant, usage.prompt_tokens + usage.completion_tokens)
        self._metrics.answers.labels(first.cache.value).inc()
        self._metrics.prompt_tokens.labels(model).inc(usage.prompt_tokens)
        self._metrics.generation_tokens.labels(model).inc(usage.completion_tokens)
        self._metrics.prefix_queries.labels(model).inc(usage.prompt_tokens)
        self._metrics.prefix_hits.labels(model).inc(usage.cached_tokens + usage.loaded_tokens)
        completion.pipe.put(
            Completed(
                usage=usage,
                timings=timings,
                cache=first.cache,
                split=any(o.split for o in outcomes),
                migrations=sum(o.migrations for o in outcomes),
            )
        )


def first_error(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """The first `CoveyError` of a group, else its first leaf: what one caller can be told."""
    leaves: list[BaseException] = []
    todo: list[BaseException] = [group]
    while todo:
        error = todo.pop(0)
        if isinstance(error, BaseExceptionGroup):
            todo += error.exceptions
        else:
            leaves.append(error)
    return next((e for e in leaves if isinstance(e, CoveyError)), leaves[0])


def _longest(outcomes: tuple[Outcome, ...]) -> Timings:
    """Choices run side by side: each stage took as long as its longest."""
    times = [o.timings for o in outcomes]
    return Timings(
        queue_s=max(t.queue_s for t in times),
        lookup_s=max(t.lookup_s for t in times),
        transfer_s=max(t.transfer_s for t in times),
        prefill_s=max(t.prefill_s for t in times),
        decode_s=max(t.decode_s for t in times),
        kv_wait_s=max(t.kv_wait_s for t in times),
    )


def _total(ended: list[_Ended]) -> Usage:
    """Each prompt counts once, whatever `n`; completions and blocks add up."""
    firsts = {e.planned.prompt_index: e.outcome.usage for e in reversed(ended)}.values()
    return Usage(
        prompt_tokens=sum(u.prompt_tokens for u in firsts),
        completion_tokens=sum(e.outcome.usage.completion_tokens for e in ended),
        cached_tokens=sum(u.cached_tokens for u in firsts),
        loaded_tokens=sum(u.loaded_tokens for u in firsts),
        blocks_moved=sum(e.outcome.usage.blocks_moved for e in ended),
    )
