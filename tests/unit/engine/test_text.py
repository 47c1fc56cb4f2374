"""Text deltas: whatever the cut, what one worker sent and what the next one sends join to the same text."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from covey.engine.fake import FakeVocabulary
from covey.engine.text import TextPipe

VOCABULARY = FakeVocabulary()
TOKENS = st.lists(st.integers(0, 255), max_size=30)
STOPS = st.lists(st.text("abc ", min_size=1, max_size=4), max_size=2)


def play(pipe: TextPipe, tokens: list[int]) -> str:
    """Push until a stop; the end flushes."""
    text = ""
    for token in tokens:
        if pipe.is_stopped:
            break
        pipe.push(token)
        delta, offset = pipe.take()
        assert offset + len(delta) == pipe.offset
        text += delta
    if not pipe.is_stopped:
        pipe.finish()
        text += pipe.take()[0]
    return text


@given(TOKENS, STOPS)
def test_the_text_ends_before_the_first_stop(tokens: list[int], stops: list[str]) -> None:
    full = b"".join(map(VOCABULARY.token_bytes, tokens)).decode(errors="replace")
    ends = [full.find(stop) for stop in stops if stop in full]
    pipe = TextPipe(VOCABULARY, stops, min_tokens=0)
    text = play(pipe, tokens)
    assert full.startswith(text)
    assert not any(stop in text for stop in stops)
    assert pipe.is_stopped == bool(ends)
    if not ends:
        assert text == full


@given(TOKENS, STOPS, st.integers(0, 30), st.integers(0, 5))
def test_a_cut_is_invisible(tokens: list[int], stops: list[str], cut: int, min_tokens: int) -> None:
    whole = TextPipe(VOCABULARY, stops, min_tokens=min_tokens)
    expected = play(whole, tokens)
    before = TextPipe(VOCABULARY, stops, min_tokens=min_tokens)
    sent = ""
    done = 0
    for token in tokens[:cut]:
        if before.is_stopped:
            break
        before.push(token)
        sent += before.take()[0]
        done += 1
    after = TextPipe(VOCABULARY, stops, min_tokens=min_tokens, sent=len(sent))
    for token in tokens[:done]:
        after.push(token)
    assert after.is_stopped == before.is_stopped
    assert sent + play(after, tokens[done:]) == expected


def test_text_that_the_client_lacks_comes_first() -> None:
    pipe = TextPipe(VOCABULARY, (), min_tokens=0, sent=1)
    for token in (1, 2, 3):  # "b", "c", "d "
        pipe.push(token)
    assert pipe.take() == ("cd ", 1)


def test_stops_before_min_tokens_do_not_count() -> None:
    pipe = TextPipe(VOCABULARY, ("b",), min_tokens=3)
    seen = []
    for _ in range(3):
        pipe.push(1)
        seen.append((*pipe.take(), pipe.is_stopped))
    assert seen == [("b", 0, False), ("b", 1, False), ("", 2, True)]
