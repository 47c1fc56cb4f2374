"""An open-loop client: requests leave at their arrival times, however slow the answers are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any

import anyio
import httpx

from covey.cli.chat import delta_text, stream_chat
from covey.clock import Clock
from covey.errors import CoveyError


@dataclass(slots=True)
class Sample:
    """One request: times in seconds on one clock; `tokens_at` is when each token's text arrived."""

    started: float
    tokens_at: list[float] = field(default_factory=list)
    ended: float = 0.0
    output_tokens: int = 0
    error: str = ""
    meta: dict[str, Any] = field(default_factory=dict)

    @property
    def ttft_s(self) -> float:
        return self.tokens_at[0] - self.started

    @property
    def e2e_s(self) -> float:
        return self.ended - self.started

    @property
    def tpot_s(self) -> float:
        """Time per output token after the first."""
        return (self.tokens_at[-1] - self.tokens_at[0]) / max(1, self.output_tokens - 1)

    @property
    def gaps_s(self) -> list[float]:
        """Inter-token latencies."""
        return [b - a for a, b in zip(self.tokens_at, self.tokens_at[1:], strict=False)]


def arrivals(rate_per_s: float, count: int, seed: int) -> list[float]:
    """Poisson arrival times from 0, in seconds."""
    rng = Random(seed)  # noqa: S311 - a workload, not a secret
    times, now = [], 0.0
    for _ in range(count):
        now += rng.expovariate(rate_per_s)
        times.append(now)
    return times


async def open_loop(
    client: httpx.AsyncClient,
    bodies: Sequence[dict[str, Any]],
    times: Sequence[float],
    clock: Clock,
    tick: Callable[[Sample], None],
) -> list[Sample]:
    """Send each body at its time and wait for all; `tick` is told of each finished request."""
    samples: list[Sample] = []
    begin = clock.now()
    async with anyio.create_task_group() as tasks:
        for body, at in zip(bodies, times, strict=True):
            await anyio.sleep(max(0.0, begin + at - clock.now()))
            tasks.start_soon(_send, client, body, clock, samples, tick)
    return samples


async def one_by_one(
    client: httpx.AsyncClient, bodies: Sequence[dict[str, Any]], clock: Clock, tick: Callable[[Sample], None]
) -> list[Sample]:
    """Send each body when the answer to the one before it is complete."""
    samples: list[Sample] = []
    for body in bodies:
        await _send(client, body, clock, samples, tick)
    return samples


async def _send(
    client: httpx.AsyncClient,
    body: dict[str, Any],
    clock: Clock,
    samples: list[Sample],
    tick: Callable[[Sample], None],
) -> None:
    sample = Sample(started=clock.now())
    samples.append(sample)
    try:
        await _stream(client, body, sample, clock)
    except (CoveyError, httpx.HTTPError) as error:
        sample.error = type(error).__name__
    sample.ended = clock.now()
    tick(sample)


async def _stream(client: httpx.AsyncClient, body: dict[str, Any], sample: Sample, clock: Clock) -> None:
    async for chunk in stream_chat(client, body):
        if chunk["choices"] and delta_text(chunk):
            sample.tokens_at.append(clock.now())
        if chunk.get("usage"):
            sample.output_tokens = chunk["usage"]["completion_tokens"]
            sample.meta = chunk.get("covey", {})
    if not sample.tokens_at:
        sample.error = "no token came"
