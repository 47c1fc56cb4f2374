"""Bare products: the matrices are the model's, and each code multiplies by them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks.limit import decode_weights
from benchmarks.products import Products, Room, _native, _torch_columns, _torch_rows, shapes
from covey.clock import MonotonicClock
from covey.model.matrix import Precision, pack, product
from covey.model.native import library
from covey.model.source import resolve
from tests.support.tiny_llama import write_tiny_llama

KERNELS = library.find_library()


def test_the_shapes_are_all_the_weights_of_a_token() -> None:
    config = resolve("smollm2").config()
    assert sum(shape.outputs * shape.inputs for shape in shapes(config)) == decode_weights(config)


def test_torch_multiplies_in_either_order() -> None:
    room, weight, x = Room(), torch.randn(96, 64), torch.randn(5, 64)
    _torch_rows(weight, room)(x)
    assert torch.allclose(room.result(5, 96, torch.float32), x @ weight.t(), atol=1e-4)
    _torch_columns(weight, room)(x)
    assert torch.allclose(room.result(96, 5, torch.float32), weight @ x.t(), atol=1e-4)


@pytest.mark.skipif(KERNELS is None, reason="the native kernels are not built")
@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8"])
@pytest.mark.parametrize("rows", [1, 5])
def test_our_kernel_is_called_as_the_runner_calls_it(precision: Precision, rows: int) -> None:
    assert KERNELS is not None
    room, matrix, x = Room(), pack(torch.randn(96, 64), precision), torch.randn(rows, 64)
    _native(KERNELS, matrix, precision, room)(x)
    assert torch.allclose(room.result(rows, 96, torch.float32), product(x, matrix), atol=1e-2, rtol=1e-3)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8"])
def test_the_fastest_is_no_slower_than_any_code(precision: Precision, tmp_path: Path) -> None:
    config = resolve(str(write_tiny_llama(tmp_path / "tiny"))).config()
    products = Products(config, precision, MonotonicClock())
    found = products.seconds(3, 1)
    assert set(found) == {*products.names, "fastest"}
    assert 0.0 < found["fastest"] <= min(found.values()) * (1 + 1e-9)
