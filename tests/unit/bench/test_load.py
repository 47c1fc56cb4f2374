"""The open loop sends on time whatever the server does, and its samples hold the times that a client sees."""

from __future__ import annotations

from itertools import pairwise

import pytest

from benchmarks.load import Sample, arrivals, one_by_one, open_loop
from covey.testing import VirtualClock, virtual_time

from .slow_server import SlowServer

BODY = {"messages": [{"role": "user", "content": "hi"}], "cache": "bypass"}


def test_arrivals_are_poisson_at_the_rate_and_the_same_for_everybody() -> None:
    times = arrivals(0.5, 4000, seed=3)
    gaps = [b - a for a, b in pairwise([0.0, *times])]
    assert all(gap > 0 for gap in gaps)
    assert sum(gaps) / len(gaps) == pytest.approx(2.0, rel=0.05)
    # Of an exponential distribution: the deviation is the mean, and a share of 1/e is above it.
    assert sum(gap > 2.0 for gap in gaps) / len(gaps) == pytest.approx(0.3679, abs=0.03)
    assert arrivals(0.5, 4000, seed=3) == times
    assert arrivals(0.5, 4000, seed=4) != times


@virtual_time
async def test_an_open_loop_does_not_wait_for_answers() -> None:
    server = SlowServer(first_s=5.0)
    ticks: list[Sample] = []
    async with server.client() as client:
        samples = await open_loop(client, [BODY] * 3, [0.0, 1.0, 1.5], VirtualClock(), ticks.append)
    assert [at - server.sent[0] for at in server.sent] == pytest.approx([0.0, 1.0, 1.5])
    assert len(ticks) == 3
    assert [s.ttft_s for s in samples] == pytest.approx([5.0] * 3)


@virtual_time
async def test_one_by_one_waits_for_each_answer() -> None:
    server = SlowServer(first_s=0.5, gap_s=0.1, tokens=5)
    async with server.client() as client:
        samples = await one_by_one(client, [BODY] * 2, VirtualClock(), lambda _: None)
    assert server.sent[1] - server.sent[0] == pytest.approx(0.9)
    first = samples[0]
    assert (first.ttft_s, first.tpot_s, first.e2e_s) == pytest.approx((0.5, 0.1, 0.9))
    assert first.gaps_s == pytest.approx([0.1] * 4)
    assert (first.output_tokens, first.meta, first.error) == (5, {"cache": "bypass"}, "")


@virtual_time
async def test_a_refused_request_is_an_error_and_not_a_time() -> None:
    server = SlowServer(status=503)
    async with server.client() as client:
        (found,) = await one_by_one(client, [BODY], VirtualClock(), lambda _: None)
    assert found.error == "Unavailable"
    assert found.tokens_at == []


@virtual_time
async def test_an_answer_without_a_token_is_an_error() -> None:
    server = SlowServer(tokens=0)
    async with server.client() as client:
        (found,) = await one_by_one(client, [BODY], VirtualClock(), lambda _: None)
    assert found.error == "no token came"
