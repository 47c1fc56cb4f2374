"""Routing: the prefix holder beats its equal, load can outweigh a prefix, and when a request is split."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from covey.policy.routing import Candidate, Route, RouteConfig, Router, Split
from covey.types.ids import WorkerId


def worker(name: str, **fields: object) -> Candidate:
    return replace(Candidate(worker=WorkerId(name)), **fields)  # type: ignore[arg-type]


candidates = st.builds(
    Candidate,
    worker=st.sampled_from([WorkerId(f"w{i}") for i in range(20)]),
    cached_tokens=st.integers(0, 2000),
    running=st.integers(0, 50),
    waiting=st.integers(0, 20),
    queued_tokens=st.integers(0, 10_000),
    age_s=st.floats(0, 30),
    sticky=st.booleans(),
)


@given(
    st.lists(candidates, min_size=1, max_size=8, unique_by=lambda c: c.worker),
    st.integers(1, 4000),
    st.integers(1, 500),
)
def test_the_prefix_holder_beats_its_equal(others: list[Candidate], prompt: int, extra: int) -> None:
    """Parrot's chooser lets a later engine without the prefix win (agents.md §1.4, defects 1 and 2)."""
    router = Router(RouteConfig())
    plain = replace(others[0], worker=WorkerId("a-plain"), cached_tokens=0)
    holder = replace(plain, worker=WorkerId("z-holder"), cached_tokens=extra)
    assert router.best([*others, plain, holder], prompt).worker != "a-plain"


@given(
    st.lists(candidates, max_size=6, unique_by=lambda c: c.worker),
    st.lists(candidates, min_size=1, max_size=6, unique_by=lambda c: c.worker),
    st.integers(1, 4000),
    st.sampled_from(Split),
)
def test_a_route_names_given_workers_and_obeys_the_mode(
    prefill: list[Candidate], decode: list[Candidate], prompt: int, split: Split
) -> None:
    route = Router(RouteConfig(split=split)).choose(prefill=prefill, decode=decode, prompt_tokens=prompt)
    assert route is not None
    assert route.decode in {c.worker for c in decode}
    assert route.prefill is None or route.prefill in {c.worker for c in prefill}
    if split is Split.NEVER or not prefill:
        assert route.prefill is None
    if split is Split.ALWAYS and prefill:
        assert route.prefill is not None


def test_nothing_decodes_without_a_decode_worker() -> None:
    assert Router(RouteConfig()).choose(prefill=[worker("p")], decode=[], prompt_tokens=9) is None


def test_load_outweighs_a_small_prefix() -> None:
    busy, idle = worker("busy", cached_tokens=32, waiting=4), worker("idle")
    assert Router(RouteConfig()).best([busy, idle], 64).worker == "idle"


def test_a_worker_not_heard_of_is_the_last_choice() -> None:
    stale, loaded = worker("a", age_s=60.0), worker("b", running=20)
    assert Router(RouteConfig()).best([stale, loaded], 100).worker == "b"


def test_a_program_stays_where_its_prefix_is_when_loads_allow() -> None:
    router = Router(RouteConfig())
    assert router.best([worker("a"), worker("b", running=4, sticky=True)], 100).worker == "b"
    assert router.best([worker("a"), worker("b", running=100, sticky=True)], 100).worker == "a"


def test_auto_splits_long_prompts_and_not_short_or_cached_ones() -> None:
    router = Router(RouteConfig())
    apart, alone = Route(decode=WorkerId("d"), prefill=WorkerId("p")), Route(decode=WorkerId("d"))

    def choose(prompt: int, prefill: Candidate, decode: Candidate) -> Route | None:
        return router.choose(prefill=[prefill], decode=[decode], prompt_tokens=prompt)

    assert choose(1000, worker("p"), worker("d")) == apart
    assert choose(20, worker("p"), worker("d")) == alone
    assert choose(1000, worker("p"), worker("d", cached_tokens=990)) == alone
    assert choose(1000, worker("p", queued_tokens=20_000), worker("d")) == alone
