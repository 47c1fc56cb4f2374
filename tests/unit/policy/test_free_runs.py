"""Free runs against a plain set of blocks, and what contiguity they give."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from covey.policy.free_runs import FreeRuns


def pieces(blocks: list[int]) -> int:
    """Runs of neighbours that a sequence's blocks, in order, consist of."""
    return sum(after != before + 1 for before, after in zip([-2, *blocks], blocks, strict=False))


class RunsMachine(RuleBasedStateMachine):
    """Blocks are taken with and without hints, and given back in any order."""

    @initialize(n=st.integers(1, 40))
    def begin(self, n: int) -> None:
        self.runs = FreeRuns(n)
        self.free = set(range(n))
        self.held: list[int] = []

    @rule(count=st.integers(0, 40), room=st.integers(0, 50), pick=st.none() | st.integers(0, 99))
    def take(self, count: int, room: int, pick: int | None) -> None:
        count = min(count, len(self.free))
        after = self.held[pick % len(self.held)] if pick is not None and self.held else None
        longest = max((n for n in range(len(self.free) + 1) if self._has_run(n)), default=0)
        taken = self.runs.take(count, after=after, room=room)
        assert len(set(taken)) == len(taken) == count
        assert set(taken) <= self.free
        if after is not None and count and after + 1 in self.free:
            assert taken[0] == after + 1
        elif count <= longest:
            assert pieces(taken) <= 1, "a run was there"
        self.free -= set(taken)
        self.held += taken

    @precondition(lambda self: self.held)
    @rule(pick=st.integers(0, 99), count=st.integers(1, 10))
    def give(self, pick: int, count: int) -> None:
        for _ in range(min(count, len(self.held))):
            block = self.held.pop(pick % len(self.held))
            self.free.add(block)
            self.runs.give(block)

    @invariant()
    def holds(self) -> None:
        self.runs.check()
        assert set(self.runs) == self.free
        assert len(self.runs) == len(self.free)

    def _has_run(self, length: int) -> bool:
        return any(set(range(block, block + length)) <= self.free for block in self.free)


RunsMachine.TestCase.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)
TestRuns = RunsMachine.TestCase


@given(n=st.integers(1, 16), room=st.integers(1, 20), first=st.integers(1, 20), data=st.data())
def test_equal_sequences_that_fill_the_pool_in_any_order_stay_in_one_piece(
    n: int, room: int, first: int, data: st.DataObject
) -> None:
    first = min(first, room)
    runs = FreeRuns(n * room)
    held = [runs.take(first, room=room) for _ in range(n)]
    turns = data.draw(st.permutations([index for index in range(n) for _ in range(room - first)]))
    for index in turns:
        held[index] += runs.take(1, after=held[index][-1])
    assert [pieces(blocks) for blocks in held] == [1] * n
    assert (len(runs), runs.runs) == (0, 0)


def test_a_shortage_splits_the_longest_runs() -> None:
    runs = FreeRuns(10)
    runs.take(10)
    for block in (0, 1, 2, 5, 6, 8):
        runs.give(block)
    assert runs.take(5) == [0, 1, 2, 5, 6]
