"""Loans of memory: only where both together gain, never more than can be spared, never in chains."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from covey.policy.debtor import Instance, Lending, LendingConfig, StepModel
from covey.types.ids import WorkerId

MODEL = StepModel(base_s=0.02, row_s=0.0005, block_s=0.00001, remote_s=0.01)

INSTANCES = st.lists(
    st.builds(
        lambda name, running, waiting, free, held, movable, needs, lent: Instance(
            worker=WorkerId(f"w{name}"),
            running=running,
            waiting=waiting,
            free_blocks=free,
            held_blocks=held,
            movable_blocks=min(movable, held),
            waiting_blocks=needs,
            lent_blocks=lent,
        ),
        st.integers(0, 9),
        st.integers(0, 40),
        st.integers(0, 20),
        st.integers(0, 400),
        st.integers(0, 400),
        st.integers(0, 400),
        st.integers(1, 40),
        st.sampled_from([0, 0, 0, 16]),
    ),
    max_size=6,
    unique_by=lambda each: each.worker,
)
MODELS = st.builds(
    StepModel,
    base_s=st.floats(0.001, 0.1),
    row_s=st.floats(0, 0.01),
    block_s=st.floats(0, 0.001),
    remote_s=st.floats(0, 1),
)


@given(instances=INSTANCES, model=MODELS, gain_min=st.floats(0, 0.5))
def test_loans_pay_and_are_covered(instances: list[Instance], model: StepModel, gain_min: float) -> None:
    lending = Lending(LendingConfig(gain_min=gain_min), model)
    loans = lending.choose(instances)
    assert loans == lending.choose(list(reversed(instances))), "the order of reports does not matter"
    by_name = {each.worker: each for each in instances}
    debtors, creditors = {loan.debtor for loan in loans}, {loan.creditor for loan in loans}
    assert not debtors & creditors
    for name in creditors:
        assert sum(loan.blocks for loan in loans if loan.creditor == name) <= lending.lendable(by_name[name])
    for name in debtors:
        assert by_name[name].waiting
        assert not by_name[name].lent_blocks
        assert 0 < sum(loan.blocks for loan in loans if loan.debtor == name) <= by_name[name].movable_blocks
    assert len(loans) <= LendingConfig().loans_max


def pair(**changes: Any) -> tuple[Instance, Instance]:
    """One worker that a long sequence fills while others wait, and one with room."""
    full = Instance(
        worker=WorkerId("a"), running=1, waiting=8, free_blocks=0, held_blocks=100, movable_blocks=90, waiting_blocks=10
    )
    idle = Instance(worker=WorkerId("b"), running=1, waiting=0, free_blocks=100, held_blocks=10)
    return replace(full, **changes), idle


def test_a_long_sequence_moves_out_of_the_way_of_many_short_ones() -> None:
    (loan,) = Lending(LendingConfig(), MODEL).choose(pair())
    assert (loan.debtor, loan.creditor, loan.blocks) == ("a", "b", 73)


@pytest.mark.parametrize(
    ("changes", "remote_s"),
    [({}, 5.0), ({"waiting": 0}, 0.01), ({"movable_blocks": 0}, 0.01), ({"lent_blocks": 5}, 0.01)],
    ids=["remote attention costs more", "nobody waits", "nothing to move", "already a creditor"],
)
def test_no_loan_where_none_pays(changes: dict[str, int], remote_s: float) -> None:
    assert Lending(LendingConfig(), replace(MODEL, remote_s=remote_s)).choose(pair(**changes)) == ()


@given(instances=INSTANCES, blocks=st.integers(1, 600))
def test_shards_of_a_long_sequence_are_all_or_nothing(instances: list[Instance], blocks: int) -> None:
    lending = Lending(LendingConfig(), MODEL)
    spare = {each.worker: lending.lendable(each) for each in instances}
    found = lending.shards(blocks, instances)
    if found:
        assert sum(count for _, count in found) == blocks
        assert all(0 < count <= spare[worker] for worker, count in found)
        assert len({worker for worker, _ in found}) == len(found)
    else:
        assert sum(spare.values()) < blocks
