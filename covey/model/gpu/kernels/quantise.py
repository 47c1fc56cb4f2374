"""Symmetric int8 quantisation of vectors: one fp32 scale each, so that a token depends on no other."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_TILE = 16
"""Vectors a program handles."""


@triton.jit
def round_half_even(x):
    """The nearest integer of an fp32 number below 2**22, ties to even, as torch rounds."""
    return (x + 12582912.0) - 12582912.0


@triton.jit
def quantise_rows(x):
    """int8 numbers [n, d] and scales [n] of fp32 rows; a row with anything but finite numbers gets a NaN scale."""
    size = tl.abs(x)
    finite = size < float("inf")
    largest = tl.max(tl.where(finite, size, 0.0), axis=1)
    inverse = tl.where(largest > 0.0, 127.0 / tl.where(largest > 0.0, largest, 1.0), 0.0)
    numbers = round_half_even(tl.where(finite, x, 0.0) * inverse[:, None])
    is_fine = tl.min(finite.to(tl.int32), axis=1) == 1
    return numbers.to(tl.int8), tl.where(is_fine, largest / 127.0, float("nan"))


@triton.jit
def _quantise_kernel(x, numbers, scales, n, width, tile: tl.constexpr, block: tl.constexpr):
    row = tl.program_id(0) * tile + tl.arange(0, tile)
    column = tl.arange(0, block)
    at = row.to(tl.int64)[:, None] * width + column[None, :]
    inside = (row < n)[:, None] & (column < width)[None, :]
    stored, scale = quantise_rows(tl.load(x + at, mask=inside, other=0.0).to(tl.float32))
    tl.store(numbers + at, stored, mask=inside)
    tl.store(scales + row, scale, mask=row < n)


@triton.jit
def _dequantise_kernel(numbers, scales, out, n, width, tile: tl.constexpr, block: tl.constexpr):
    row = tl.program_id(0) * tile + tl.arange(0, tile)
    column = tl.arange(0, block)
    at = row.to(tl.int64)[:, None] * width + column[None, :]
    inside = (row < n)[:, None] & (column < width)[None, :]
    scale = tl.load(scales + row, mask=row < n, other=0.0)
    x = tl.load(numbers + at, mask=inside, other=0).to(tl.float32) * scale[:, None]
    tl.store(out + at, x.to(out.dtype.element_ty), mask=inside)


def quantise(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """int8 numbers and fp32 scales of the rows of `x` [n, width]: x is about numbers * scale, off by half a scale."""
    n, width = x.shape
    numbers = torch.empty(n, width, dtype=torch.int8, device=x.device)
    scales = torch.empty(n, dtype=torch.float32, device=x.device)
    if n:
        grid = (triton.cdiv(n, _TILE),)
        block = triton.next_power_of_2(width)
        _quantise_kernel[grid](x.contiguous(), numbers, scales, n, width, tile=_TILE, block=block)
    return numbers, scales


def quantise_reference(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The same in torch."""
    finite = x.float().isfinite()
    safe = torch.where(finite, x.float(), 0.0)
    largest = safe.abs().amax(dim=1)
    inverse = torch.where(largest > 0, 127.0 / largest, 0.0)
    scales = torch.where(finite.all(dim=1), largest / 127.0, torch.nan)
    return (safe * inverse[:, None]).round().to(torch.int8), scales


def dequantise(numbers: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Numbers * scale [n, width] as `dtype`."""
    n, width = numbers.shape
    out = torch.empty(n, width, dtype=dtype, device=numbers.device)
    if n:
        grid = (triton.cdiv(n, _TILE),)
        block = triton.next_power_of_2(width)
        _dequantise_kernel[grid](numbers.contiguous(), scales, out, n, width, tile=_TILE, block=block)
    return out


def dequantise_reference(numbers: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The same in torch."""
    return (numbers.float() * scales[:, None]).to(dtype)
