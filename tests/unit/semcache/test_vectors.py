"""The vector index against brute force, across generations and removals."""

from __future__ import annotations

import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.semcache.graph import Graph
from services.semcache.vectors import VectorIndex, Vectors

DIM = 16


def unit(seed: int) -> Vectors:
    vector = np.random.default_rng(seed).standard_normal(DIM)
    return (vector / np.linalg.norm(vector)).astype(np.float32)


@settings(max_examples=60)
@given(st.lists(st.tuples(st.sampled_from(["add", "remove", "start", "finish"]), st.integers(0, 30)), max_size=80))
def test_equals_brute_force_whatever_happens_during_a_rebuild(steps: list[tuple[str, int]]) -> None:
    index, live, label, rebuild = VectorIndex(DIM, tail_max=4), dict[int, Vectors](), 0, None
    for step, number in steps:
        if step == "add":
            index.add(label, unit(label))
            live[label] = unit(label)
            label += 1
        elif step == "remove":
            assert index.remove(number) == (live.pop(number, None) is not None)
        elif step == "start" and rebuild is None:
            rebuild = index.rebuild()
        elif step == "finish" and rebuild is not None:
            index.adopt(rebuild, rebuild.build())
            rebuild = None
        assert len(index) == len(live)
        asked = unit(1000 + number)
        found = index.search(asked, 3)
        expected = sorted((float(v @ asked) for v in live.values()), reverse=True)[:3]
        assert [n.similarity for n in found] == pytest.approx(expected, abs=1e-5)
        assert all(n.label in live for n in found)


def renewed(index: VectorIndex) -> bool:
    """Build what is due; say whether anything was."""
    if not index.crowded:
        return False
    rebuild = index.rebuild()
    index.adopt(rebuild, rebuild.build())
    return True


def test_crowded_when_the_tail_is_full_and_again_when_a_third_is_dead() -> None:
    index = VectorIndex(DIM, tail_max=4)
    for label in range(5):
        index.add(label, unit(label))
    assert renewed(index)
    assert not renewed(index)
    assert (len(index), index.sealed) == (5, 5)
    index.remove(0)
    index.remove(1)
    assert renewed(index)
    assert not renewed(index)
    assert [label for label in range(5) if label in index] == [2, 3, 4]
    assert (len(index), index.sealed) == (3, 3)


def test_nearest_is_found_behind_many_removed_ones() -> None:
    near = [unit(5) + 0.001 * unit(100 + i) for i in range(200)]
    vectors = np.stack([v / np.linalg.norm(v) for v in near] + [unit(6)]).astype(np.float32)
    graph = Graph.of(np.arange(201), vectors)
    found = graph.search(unit(5), 4, frozenset(range(200)))
    assert [n.label for n in found] == [200]


@pytest.mark.parametrize(
    "wrong", [np.zeros(DIM), np.full(DIM, np.nan), np.full(DIM, np.inf), 2 * unit(1), np.ones(DIM + 1)]
)
def test_refuses_what_would_spoil_the_index(wrong: Vectors) -> None:
    index = VectorIndex(DIM, tail_max=4)
    with pytest.raises(ValueError):
        index.add(1, wrong.astype(np.float32))
    assert len(index) == 0


def test_a_label_is_used_once() -> None:
    index = VectorIndex(DIM, tail_max=4)
    index.add(1, unit(1))
    with pytest.raises(ValueError, match="taken"):
        index.add(1, unit(2))


def test_hnsw_recall_on_thousands() -> None:
    vectors = np.stack([unit(seed) for seed in range(3000)])
    graph = Graph.of(np.arange(3000), vectors)
    hits = sum(graph.search(v, 1, frozenset())[0].label == i for i, v in enumerate(vectors[:300]))
    assert hits >= 297


def test_a_generation_is_searched_while_the_next_is_built() -> None:
    index = VectorIndex(DIM, tail_max=10)
    for label in range(1500):
        index.add(label, unit(label))
    first = index.rebuild()
    index.adopt(first, first.build())
    for label in range(1500, 1504):
        index.add(label, unit(label))
    second = index.rebuild()
    built: list[Graph | None] = []
    thread = threading.Thread(target=lambda: built.append(second.build()))
    thread.start()
    while thread.is_alive():
        assert index.search(unit(7), 1)[0].label == 7
    thread.join()
    index.adopt(second, built[0])
    assert index.sealed == 1504


def test_segments_merge_until_a_graph_is_large_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("services.semcache.vectors.GRAPH_MAX", 64)
    index = VectorIndex(DIM, tail_max=4)
    for label in range(400):
        index.add(label, unit(label))
        while renewed(index):
            pass
    sizes = sorted(map(len, index.segments), reverse=True)
    assert max(sizes) <= 64
    assert len(sizes) < 2 * 400 / 64 + 4
    assert all(index.search(unit(label), 1)[0].label == label for label in range(0, 400, 7))
