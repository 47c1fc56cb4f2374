"""Our runner and transformers behind the same questions: the same tokens, as many steps as were asked for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.drivers.covey_model import Covey
from benchmarks.drivers.transformers_model import Transformers
from tests.support.tiny_llama import write_tiny_llama

PROMPT = [7, 60, 33, 12, 99, 120, 5, 81, 14, 200]
OTHERS = [[1, 2, 3, 4], [50, 60, 70, 80]]

pytestmark = pytest.mark.xdist_group("bench-drivers")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def ours(folder: Path) -> Covey:
    return Covey(str(folder), folder.parent / "cache", "fp32")


@pytest.fixture(scope="module")
def theirs(folder: Path) -> Transformers:
    return Transformers(str(folder))


def test_both_run_the_same_model(ours: Covey, theirs: Transformers) -> None:
    found = ours.greedy(PROMPT, 12)
    assert len(found) == 12
    assert found == theirs.greedy(PROMPT, 12)


def test_every_step_has_its_time(ours: Covey, theirs: Transformers) -> None:
    for model in (ours, theirs):
        assert model.prefill(PROMPT) > 0
        times = model.decode(OTHERS, 5)
        assert len(times) == 5
        assert min(times) > 0


def test_a_new_prompt_beside_running_ones_counts_all_tokens(ours: Covey, theirs: Transformers) -> None:
    prompt = [i % 250 for i in range(300)]
    for model, steps in ((ours, 3), (theirs, 2)):
        found = model.mixed(OTHERS, prompt)
        assert len(found["seconds"]) == steps
        assert found["tokens"] == 300 + (steps if model is ours else 1) * len(OTHERS)


def test_a_grid_point_has_the_context_that_was_asked_for(ours: Covey) -> None:
    assert len(ours.grid(rows=3, context=70, repeats=4)) == 4
    assert ours.kv_bytes_per_token() == 4 * 2 * 2 * 2 * 16


def test_bound_sequences_follow_their_grammar(ours: Covey) -> None:
    grammar = json.dumps({"regex": "[ab]{40}"})
    times = ours.constrained(OTHERS, 6, [grammar, grammar])
    assert len(times) == 6
