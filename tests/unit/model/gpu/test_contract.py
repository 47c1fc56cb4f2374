"""The contract suite of runners, on the GPU runner with its kernels in the interpreter."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from covey.model.plan import Runner
from tests.contract import test_runner as suite
from tests.contract.test_runner import (  # noqa: F401 - pytest collects them here once more
    test_a_cancelled_row_is_in_no_result_and_disturbs_nobody,
    test_a_suspended_row_may_begin_again_and_a_dropped_one_must,
    test_drafts_prefills_and_plain_rows_share_a_step,
    test_layer_ranges_add_up_to_a_step,
    test_only_what_the_mask_allows_is_drawn,
    test_other_tokens_do_not_go_on_from_what_was_left,
    test_preempted_rows_stop_between_layers_and_go_on,
    test_rows_that_contradict_each_other_are_refused,
)
from tests.support.tiny_llama import write_tiny_llama

from .opened import open_tiny


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("gpu") / "tiny"
    return write_tiny_llama(target, n_layers=suite.LAYERS, hidden=32, n_heads=2, n_kv_heads=1)


@pytest.fixture
def runner(folder: Path) -> Iterator[Runner]:
    made = open_tiny(folder, folder.parent / "cache")
    yield made
    made.close()


@pytest.mark.parametrize(("name", "right"), [("greedy", 4), ("seeded", 1), ("penalty", 3)])
def test_draws_of_a_draft_are_those_of_plain_steps(runner: Runner, name: str, right: int) -> None:
    suite.test_draws_of_a_draft_are_those_of_plain_steps(runner, name, right)
