"""Whatever attempts do, the client's stream is the undisturbed one."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from covey.types.generate import Tokens
from services.gateway.relay import BrokenStream, Relay

TEXTS = st.lists(st.text("abcé ", min_size=0, max_size=3), min_size=1, max_size=6)


@given(TEXTS, st.data())
def test_restarts_overlap_and_stale_events_leave_no_seam(texts: list[str], data: st.DataObject) -> None:
    """Each attempt starts anywhere at or before what the client has, and sends pieces of any size."""
    relay = Relay(0)
    starts = [sum(map(len, texts[:i])) for i in range(len(texts) + 1)]
    got: list[str] = []
    while relay.tokens < len(texts):
        at = data.draw(st.integers(0, relay.tokens), label="start")
        until = data.draw(st.integers(relay.tokens + 1, len(texts)), label="end")
        while at < until:
            size = data.draw(st.integers(1, until - at), label="size")
            tokens = Tokens(
                attempt=relay.attempt,
                offset=at,
                ids=tuple(range(at, at + size)),
                text="".join(texts[at : at + size]),
                text_offset=starts[at],
            )
            assert relay.accept(replace(tokens, attempt=relay.attempt + 1)) is None
            delta = relay.accept(tokens)
            got.append(delta.text if delta else "")
            at += size
        relay.attempt += 1
        resume = relay.resume()
        assert resume is None or len(resume.emitted) == relay.tokens
    assert relay.ids == tuple(range(len(texts)))
    assert "".join(got) == relay.text == "".join(texts)


def test_a_gap_is_broken() -> None:
    relay = Relay(0)
    relay.accept(Tokens(attempt=0, offset=0, ids=(1,), text="a"))
    with pytest.raises(BrokenStream):
        relay.accept(Tokens(attempt=0, offset=2, ids=(3,), text="c", text_offset=1))
    with pytest.raises(BrokenStream):
        relay.accept(Tokens(attempt=0, offset=1, ids=(2,), text="c", text_offset=2))
