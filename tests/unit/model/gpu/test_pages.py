"""Quantising, scattering and gathering: kernels against their references, and the layout of a page spelt out."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from covey.errors import InvalidArgument
from covey.model.gpu.kernels.gather import gather, gather_reference
from covey.model.gpu.kernels.quantise import dequantise, dequantise_reference, quantise, quantise_reference
from covey.model.gpu.kernels.scatter import scatter, scatter_reference
from covey.model.gpu.pages import DevicePool
from covey.model.pool import KvDtype

from .pools import ALL_KV_DTYPES, CPU, layout, source

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "width"), [(1, 16), (5, 24), (33, 64)])
def test_quantising_equals_the_reference(n: int, width: int, dtype: torch.dtype) -> None:
    x = (torch.randn(n, width, generator=source(n)) * 3).to(dtype)
    x[0] = 0.0
    numbers, scales = quantise(x)
    expected, expected_scales = quantise_reference(x)
    torch.testing.assert_close(scales, expected_scales, rtol=1e-6, atol=0)
    assert (numbers.int() - expected.int()).abs().max() <= 1
    assert (numbers != expected).float().mean() <= 0.002, "only ties may round another way"
    for target in DTYPES:
        found = dequantise(numbers, scales, target)
        torch.testing.assert_close(found, dequantise_reference(numbers, scales, target), rtol=1e-2, atol=1e-6)
    error = (dequantise(numbers, scales, torch.float32) - x.float()).abs()
    assert torch.all(error <= scales[:, None] * 0.501)


def test_what_is_not_finite_marks_its_own_row_only() -> None:
    x = torch.ones(4, 16)
    x[1, 3], x[2, 5] = torch.nan, torch.inf
    for numbers, scales in (quantise(x), quantise_reference(x)):
        assert scales.isnan().tolist() == [False, True, True, False]
        assert numbers[0].tolist() == [127] * 16


@pytest.mark.parametrize("kv_dtype", ALL_KV_DTYPES)
@pytest.mark.parametrize(("block_size", "head_dim", "kv_heads"), [(8, 16, 2), (16, 24, 1), (12, 8, 3)])
def test_scattered_tokens_are_gathered_again(kv_dtype: KvDtype, block_size: int, head_dim: int, kv_heads: int) -> None:
    pages = layout(kv_dtype, block_size=block_size, head_dim=head_dim, kv_heads=kv_heads)
    count, table = 21, torch.tensor([4, 0, 2], dtype=torch.int32)
    positions = torch.arange(count)
    slots = table[positions // block_size].long() * block_size + positions % block_size
    slots[7] = -1  # a padded row
    qkv = torch.randn(count, (2 + 2 * kv_heads) * head_dim, generator=source(3))
    kv = qkv[:, 2 * head_dim :]
    mine, reference = DevicePool(pages, 5, CPU), DevicePool(pages, 5, CPU)
    scatter(kv, slots, mine, 1)
    scatter_reference(kv, slots, reference, 1)
    assert torch.equal(mine.blocks, reference.blocks) or (pages.kv_dtype == "int8")
    needed = table[: -(-count // block_size)]
    for dtype in (torch.float32, torch.float16):
        found = gather(mine, 1, needed, count, dtype)
        torch.testing.assert_close(found, gather_reference(mine, 1, needed, count, dtype), rtol=1e-3, atol=1e-6)
    found = gather(mine, 1, needed, count, torch.float32)
    expected = kv.reshape(count, 2, kv_heads, head_dim).transpose(0, 1).clone()
    expected[:, 7] = 0.0
    tolerance = {"fp32": 0.0, "fp16": 2e-3, "int8": 0.02}[kv_dtype]
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)
    assert torch.all(gather(mine, 0, needed, count, torch.float32) == 0.0), "another layer stays as it was"


@pytest.mark.parametrize("kv_dtype", ALL_KV_DTYPES)
def test_a_page_lies_as_the_layout_says(kv_dtype: KvDtype) -> None:
    """Byte for byte: layer, then K pages transposed, then V pages; int8 pages end in their scales."""
    pages = layout(kv_dtype, block_size=4, head_dim=8, kv_heads=2, n_layers=3)
    assert pages.page_bytes == {"fp32": 128, "fp16": 64, "int8": 32 + 16}[kv_dtype]
    assert pages.block_bytes == 3 * 2 * 2 * pages.page_bytes
    pool = DevicePool(pages, 3, CPU)
    kv = torch.arange(1.0, 33.0).reshape(1, 32) / 4
    scatter(kv, torch.tensor([2 * 4 + 1]), pool, 1)
    block = pool.blocks[2].view(3, 4, pages.page_bytes)
    assert torch.all(block[0] == 0)
    assert torch.all(block[2] == 0)
    for page, is_key in enumerate((True, True, False, False)):
        numbers = block[1, page, : 32 * pool.dtype.itemsize].contiguous().view(pool.dtype).float()
        if pages.kv_dtype == "int8":
            scales = block[1, page, 32:].contiguous().view(torch.float32)
            assert (scales != 0).tolist() == [False, True, False, False]
            numbers *= scales[1]
        token = numbers.view(8, 4)[:, 1] if is_key else numbers.view(4, 8)[1]
        torch.testing.assert_close(token, kv[0, page * 8 : page * 8 + 8], rtol=0, atol=0.04)
        assert int((numbers != 0).sum()) == 8


@settings(max_examples=6, derandomize=True)
@given(
    st.sampled_from(ALL_KV_DTYPES),
    st.sampled_from((4, 8, 16)),
    st.lists(st.integers(0, 39), min_size=1, max_size=20, unique=True),
)
def test_any_slots_are_written_and_no_others(kv_dtype: KvDtype, block_size: int, chosen: list[int]) -> None:
    pages = layout(kv_dtype, block_size=block_size, kv_heads=1, n_layers=1)
    mine, reference = (DevicePool(pages, 40 // block_size + 1, CPU) for _ in range(2))
    kv = torch.randn(len(chosen), 32, generator=source(len(chosen)))
    scatter(kv, torch.tensor(chosen), mine, 0)
    scatter_reference(kv, torch.tensor(chosen), reference, 0)
    table = torch.arange(40 // block_size + 1, dtype=torch.int32)
    found, expected = (gather_reference(pool, 0, table, 40, torch.float32) for pool in (mine, reference))
    torch.testing.assert_close(found, expected, rtol=0, atol=0.03 if (pages.kv_dtype == "int8") else 0)
    untouched = sorted(set(range(40)) - set(chosen))
    assert torch.all(found[:, untouched] == 0.0)


def test_unaligned_scales_are_refused() -> None:
    with pytest.raises(InvalidArgument, match="multiple of 4"):
        DevicePool(layout("int8", head_dim=6, block_size=3), 1, CPU)
