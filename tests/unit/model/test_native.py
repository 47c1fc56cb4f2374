"""The native kernels: the reference's values, and the same bits whatever a row is computed with."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from covey.errors import InvalidArgument
from covey.model.matrix import GROUP, Matrix, Precision, pack, product
from covey.model.native import compile as compiler
from covey.model.native import library
from covey.model.native.library import BUILDS, find_library
from covey.model.pool import KvDtype
from covey.model.runner import TorchRunner, open_runner
from tests.support.tiny_llama import write_tiny_llama

from .driving import generate, log_probabilities, row

PRECISIONS: tuple[Precision, ...] = ("fp32", "bf16", "int8")
KV_DTYPES: tuple[KvDtype, ...] = ("fp32", "fp16", "int8")
HERE = [name for name in BUILDS if find_library(name) is not None]
PROMPT = [(11 * i * i + 5 * i) % 256 for i in range(70)]
KINDS = {"fp32": 0, "bf16": 1, "int8": 2}


def native_product(build: str, x: torch.Tensor, matrix: Matrix, precision: Precision) -> torch.Tensor:
    kernels = find_library(build)
    assert kernels is not None
    rows, groups = x.shape[0], -(-x.shape[1] // GROUP)
    room = [torch.empty(rows * groups * GROUP), torch.empty(rows * groups * GROUP, dtype=torch.int8)]
    room += [torch.empty(rows * groups), torch.empty(rows * groups, dtype=torch.int32)]
    packed = library.Packed(*(buffer.data_ptr() for buffer in room))
    given_matrix = library.Matrix(
        data=matrix.data.data_ptr(),
        scale=matrix.scale.data_ptr() if matrix.scale is not None else None,
        outputs=matrix.outputs,
        inputs=matrix.inputs,
        kind=KINDS[precision],
    )
    out = torch.full((rows, matrix.outputs), torch.nan)
    kernels.product(given_matrix, library.Room(packed=packed), x.contiguous(), out)
    return out


def test_this_processor_has_kernels() -> None:
    """The suite runs on x86 with AVX2 and a compiler: else every figure and promise of the kernels goes untested."""
    assert "avx2" in HERE


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 40),
    inputs=st.integers(1, 150),
    outputs=st.integers(1, 100),
    precision=st.sampled_from(PRECISIONS),
    seed=st.integers(0, 99),
)
def test_products_are_the_references(rows: int, inputs: int, outputs: int, precision: Precision, seed: int) -> None:
    source = torch.Generator().manual_seed(seed)
    x, weight = torch.randn(rows, inputs, generator=source), torch.randn(outputs, inputs, generator=source)
    matrix = pack(weight, precision)
    expected = product(x, matrix)
    found = {build: native_product(build, x, matrix, precision) for build in HERE}
    for values in found.values():
        torch.testing.assert_close(values, expected, atol=1e-4 * inputs**0.5, rtol=1e-5)
        assert torch.equal(values, found[HERE[0]]), "every processor computes the same bits"
    alone = native_product(HERE[0], x[rows // 2 : rows // 2 + 1], matrix, precision)
    assert torch.equal(alone[0], found[HERE[0]][rows // 2]), "a row does not depend on its neighbours"


@pytest.mark.parametrize("precision", PRECISIONS)
def test_packing_keeps_the_matrix(precision: Precision) -> None:
    weight = torch.randn(45, 70)
    error = (pack(weight, precision).rows() - weight).abs().amax(dim=1) / weight.abs().amax(dim=1)
    assert error.max() <= {"fp32": 0.0, "bf16": 2**-8, "int8": 0.5 / 127 + 1e-6}[precision]


def test_a_quantised_product_is_close_to_the_exact_one() -> None:
    x, weight = torch.randn(5, 576), torch.randn(64, 576)
    exact, found = x @ weight.t(), product(x, pack(weight, "int8"))
    assert (found - exact).norm() / exact.norm() < 0.012


def test_an_outlier_costs_its_own_group_only() -> None:
    """Activations are scaled in groups of 64 inputs: one huge value leaves the other groups exact to a percent."""
    x, weight = torch.randn(1, 256), torch.randn(32, 256)
    x[0, 3] = 1e4
    rest = weight.clone()
    rest[:, :64] = 0.0
    exact, found = x @ rest.t(), product(x, pack(rest, "int8"))
    assert (found - exact).norm() / exact.norm() < 0.02


@pytest.fixture(params=[(p, k) for p in PRECISIONS for k in KV_DTYPES if p == "fp32" or k == "int8"], ids=str)
def lossy(request: pytest.FixtureRequest) -> tuple[Precision, KvDtype]:
    found: tuple[Precision, KvDtype] = request.param
    return found


def tiny_runner(folder: Path, cache: Path, kernels: str, lossy: tuple[Precision, KvDtype]) -> TorchRunner:
    precision, kv_dtype = lossy
    return open_runner(
        str(folder), cache_dir=cache, n_blocks=64, block_size=8, kernels=kernels, precision=precision, kv_dtype=kv_dtype
    )


@pytest.mark.parametrize("build", HERE)
def test_layers_are_the_references(
    build: str, lossy: tuple[Precision, KvDtype], tiny_folder: Path, weight_cache: Path
) -> None:
    """Chunks and decoding over any precision of weights and blocks, against the same steps in torch."""
    found = {}
    for kernels in (build, "torch"):
        runner = tiny_runner(tiny_folder, weight_cache, kernels, lossy)
        assert runner.kernels == kernels
        table = [9, 4, 17, 2, 33, 60, 5, 8, 0, 21]
        values = [
            log_probabilities(runner, [row(1, PROMPT[start:end], start, table)])[1]
            for start, end in ((0, 30), (30, 61), (61, 62), (62, 63))
        ]
        found[kernels] = np.stack(values)
    # Quantised blocks and activations round: a value at a boundary may fall on either side.
    np.testing.assert_allclose(found[build], found["torch"], atol=2e-4 if lossy == ("fp32", "fp32") else 0.05, rtol=0)


@pytest.mark.parametrize("build", HERE)
def test_the_same_bits_in_any_batch(
    build: str, lossy: tuple[Precision, KvDtype], tiny_folder: Path, weight_cache: Path
) -> None:
    """Prefilled whole, in chunks or token by token, alone or among others, on one thread or two: equal bits."""
    runner = tiny_runner(tiny_folder, weight_cache, build, lossy)
    tables = [list(range(i * 10, i * 10 + 10)) for i in range(6)]
    whole = log_probabilities(runner, [row(0, PROMPT, 0, tables[0])])[0]
    for i, size in enumerate((1, 7, 32), start=1):
        for start in range(0, len(PROMPT), size):
            piece = PROMPT[start : start + size]
            others = [row(9, PROMPT[: 3 + start % 5], 0, tables[5]), row(8, [start], 0, tables[4])]
            values = log_probabilities(runner, [others[0], row(i, piece, start, tables[i]), others[1]])[i]
        assert np.array_equal(values, whole), f"chunks of {size}"
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert np.array_equal(log_probabilities(runner, [row(0, PROMPT, 0, tables[0])])[0], whole)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("build", HERE)
def test_batched_int8_requests_get_their_own_tokens(build: str, tiny_folder: Path, weight_cache: Path) -> None:
    runner = tiny_runner(tiny_folder, weight_cache, build, ("int8", "int8"))
    prompts = [PROMPT[i : i + 9 + 3 * i] for i in range(6)]
    tables = [list(range(i * 6, i * 6 + 6)) for i in range(6)]
    alone = [generate(runner, prompt, 12, table) for prompt, table in zip(prompts, tables, strict=True)]
    together: list[list[int]] = [[] for _ in prompts]
    from covey.model.plan import StepPlan

    while len(together[0]) < 12:
        rows = []
        for i, (prompt, answer) in enumerate(zip(prompts, together, strict=True)):
            start = len(prompt) + len(answer) - 1 if answer else 0
            rows.append(row(i, answer[-1:] or prompt, start, tables[i]))
        for drawn in runner.step(StepPlan(rows=tuple(rows))).sampled:
            together[drawn.seq].append(drawn.draws[0].token)
    assert together == alone


def test_shapes_that_the_kernels_do_not_know_run_in_torch(tmp_path: Path) -> None:
    folder = write_tiny_llama(tmp_path / "model")
    odd = open_runner(str(folder), cache_dir=tmp_path, n_blocks=4, block_size=12)
    assert odd.kernels == "torch"
    assert len(generate(odd, PROMPT[:20], 4, [0, 1, 2])) == 4


def test_unknown_kernels_are_refused(tiny_folder: Path, weight_cache: Path) -> None:
    with pytest.raises(InvalidArgument, match="no kernels named 'sve'"):
        open_runner(str(tiny_folder), cache_dir=weight_cache, n_blocks=2, kernels="sve")


def test_without_a_compiler_nothing_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    assert compiler.compile_kernels() == []
