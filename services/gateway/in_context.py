"""The model that chooses for itself: semcache says which model answers, and shows a small one earlier answers."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace

import numpy as np

from covey.clock import Clock
from covey.codec.methods import SemCache
from covey.errors import CoveyError, Unavailable
from covey.net.rpc import Channel, Channels
from covey.policy.example_choice import UsefulExample, with_examples
from covey.types.generate import Role
from covey.types.program import CacheMode, EmbedRequest
from covey.types.semcache import CacheQuery, Example, RouteOutcome, RouteQuery, RouteReply

from .config import InContextSettings
from .errands import Errands
from .fleet import Fleet
from .job import Job, Outcome

log = logging.getLogger(__name__)

TEXT_MAX = 16_384
LEARN_TIMEOUT_S = 5.0

Ask = Callable[[Job], Awaitable[str]]
"""Runs a job and returns its whole text."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Chosen:
    """A job with the model that is to answer it; `decision` is what its outcome is reported by, where there is one."""

    job: Job
    original: Job
    decision: str = ""
    second: str = ""


class InContext:
    """Turns a request for the model `name` into one for one of `models`. Without semcache the dearest one answers."""

    def __init__(
        self, channels: Channels, fleet: Fleet, clock: Clock, errands: Errands, settings: InContextSettings
    ) -> None:
        """`errands` run the second answers that teach the choice: they take as long as a request."""
        self._channels = channels
        self._fleet = fleet
        self._clock = clock
        self._errands = errands
        self._settings = settings

    async def choose(self, job: Job) -> Chosen:
        """Return the job as it is to run; one for any other model unchanged."""
        models = self._settings.models
        if not models or job.model != self._settings.name:
            return Chosen(job=job, original=job)
        plain = Chosen(job=replace(job, model=models[-1]), original=job)
        text = _last_turn(job)
        address = self._fleet.service(Role.SEMCACHE)
        if not text or address is None or job.cache is CacheMode.BYPASS:
            return plain
        channel = self._channels.to(address)
        try:
            examples = await self._examples(channel, job, text)
            query = RouteQuery(tenant=job.tenant, text=text, models=models, load=self._loads(models), examples=examples)
            reply: RouteReply = await channel.call(SemCache.ROUTE, query, timeout_s=self._settings.deadline_s)
        except CoveyError as error:  # help that is late or gone costs no answer
            log.info("no choice of a model code=%s", error.code)
            return plain
        if reply.model not in models:
            return plain
        chosen = replace(job, model=reply.model)
        if reply.model != models[-1] and examples:
            chosen = _shown(chosen, text, examples)
        return Chosen(job=chosen, original=job, decision=reply.decision, second=reply.second)

    def finished(self, chosen: Chosen, outcome: Outcome, ask: Ask) -> None:
        """Where a second answer is worth having, get it in the background and report what both models earned."""
        if chosen.decision and chosen.second and outcome.text:
            self._errands.run(lambda: self._compare(chosen, outcome.text, ask), "second answer")

    async def _examples(self, channel: Channel, job: Job, text: str) -> tuple[Example, ...]:
        query = CacheQuery(
            tenant=job.tenant,
            model=self._settings.models[-1],
            text=text,
            examples_max=self._settings.examples_max,
            example_tokens_max=self._settings.example_tokens_max,
        )
        reply = await channel.call(SemCache.LOOKUP, query, timeout_s=self._settings.deadline_s)
        return reply.examples

    def _loads(self, models: tuple[str, ...]) -> tuple[float, ...]:
        """Requests that wait at each model's decode workers, for each that runs."""
        found = []
        for model in models:
            loads = [view.load for view, _ in self._fleet.engines(model, Role.DECODE) if view.load is not None]
            running = sum(load.running for load in loads)
            found.append(sum(load.waiting for load in loads) / max(1, running))
        return tuple(found)

    async def _compare(self, chosen: Chosen, text: str, ask: Ask) -> None:
        """Ask the second model the same; the dearest model's answer is the yardstick of the other's."""
        other = replace(
            chosen.original,
            model=chosen.second,
            cache=CacheMode.BYPASS,
            deadline_at=self._clock.now() + self._settings.second_s,
        )
        answers = {chosen.job.model: text, chosen.second: await ask(other)}
        dearest = max(answers, key=self._settings.models.index)
        address = self._fleet.service(Role.SEMCACHE)
        if address is None or not all(answers.values()):
            return
        channel = self._channels.to(address)
        likeness = await self._likeness(channel, tuple(answers.values()))
        for model in answers:
            outcome = RouteOutcome(
                tenant=chosen.job.tenant,
                decision=chosen.decision,
                model=model,
                reward=1.0 if model == dearest else likeness,
            )
            await channel.call(SemCache.LEARN, outcome, timeout_s=LEARN_TIMEOUT_S)

    async def _likeness(self, channel: Channel, texts: tuple[str, ...]) -> float:
        name = next(iter(self._fleet.embedders()), None)
        if name is None:
            raise Unavailable("no semcache is there to embed", field="model")
        request = EmbedRequest(model=name, inputs=tuple(" ".join(text.split()[:120]) for text in texts))
        reply = await channel.call(SemCache.EMBED, request, timeout_s=LEARN_TIMEOUT_S)
        one, other = (np.array(vector.values) for vector in reply.vectors)
        return min(1.0, max(0.0, float(one @ other)))


def _last_turn(job: Job) -> str:
    """The user turn that asks; empty for requests that examples or another model could change the meaning of."""
    messages = job.prompts[0].messages if len(job.prompts) == 1 else ()
    is_free = messages and messages[-1].role == "user" and job.tooling is None and not job.params.grammar
    return messages[-1].content if is_free and len(messages[-1].content) <= TEXT_MAX else ""


def _shown(job: Job, text: str, examples: tuple[Example, ...]) -> Job:
    useful = [
        UsefulExample(
            id=e.entry,
            text=e.text,
            answer=e.answer,
            similarity=e.similarity,
            utility=e.utility,
            vector=np.empty(0, np.float32),
        )
        for e in examples
    ]
    prompt = job.prompts[0]
    asking = replace(prompt.messages[-1], content=with_examples(text, useful))
    prompts = (replace(prompt, messages=(*prompt.messages[:-1], asking)),)
    return replace(job, prompts=prompts, shown=tuple(e.entry for e in examples))
