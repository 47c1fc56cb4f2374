"""Stop strings are found wherever the text is cut, and nothing is held back without need."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from covey.model.text_stream import StopMatcher

ALPHABET = st.text(alphabet="ab\u00e9", max_size=30)
STOPS = st.lists(st.text(alphabet="ab\u00e9", min_size=1, max_size=4), max_size=4)


def reference(text: str, stops: list[str]) -> tuple[str, str | None]:
    """Grow the text a character at a time until it ends in a stop string, the longest of them."""
    for end in range(1, len(text) + 1):
        ending = [s for s in stops if text[:end].endswith(s)]
        if ending:
            stop = max(ending, key=len)
            return text[: end - len(stop)], stop
    return text, None


@given(ALPHABET, STOPS, st.lists(st.integers(1, 7), min_size=1, max_size=30))
def test_the_cut_does_not_matter(text: str, stops: list[str], sizes: list[int]) -> None:
    matcher, shown, hit, at = StopMatcher(stops), "", None, 0
    for size in sizes * 30:
        if at >= len(text) or hit is not None:
            break
        result = matcher.push(text[at : at + size])
        at += size
        shown, hit = shown + result.text, result.stop
        if hit is None:
            held = text[len(shown) : at]
            assert held == "" or any(s != held and s.startswith(held) for s in stops)
    assert (shown + matcher.flush(), hit) == reference(text, stops)


def test_after_a_stop_all_is_swallowed() -> None:
    matcher = StopMatcher(["END"])
    assert matcher.push("one EN").text == "one "
    result = matcher.push("D two")
    assert (result.text, result.stop) == ("", "END")
    assert matcher.push("three").text == ""
    assert matcher.flush() == ""


def test_without_stops_nothing_is_held() -> None:
    matcher = StopMatcher(["", ""])
    assert matcher.push("abc").text == "abc"
    assert matcher.flush() == ""
