"""Weight matrices in panels, as the product kernels stream them, in fp32, bf16 or int8; and their product in torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch.nn.functional import pad

Precision = Literal["fp32", "bf16", "int8"]

PANEL = 32
"""Outputs that a kernel computes together: they lie side by side for each input."""

GROUP = 64
"""Inputs that share the scale of a quantised activation."""

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "int8": torch.int8}


@dataclass(frozen=True, slots=True, kw_only=True)
class Matrix:
    """A packed [outputs, inputs] matrix.

    `data` is [panel, input, 32], or for int8 [panel, input / 4, 32, 4] with one `scale` an output; outputs and inputs
    are padded with zeros.
    """

    data: torch.Tensor
    scale: torch.Tensor | None
    outputs: int
    inputs: int

    def rows(self) -> torch.Tensor:
        """The matrix as [outputs, inputs] in fp32."""
        return self.columns().permute(0, 2, 1).reshape(-1, self.inputs)[: self.outputs]

    def columns(self) -> torch.Tensor:
        """The matrix as [panel, input, 32] in fp32; a view where it is stored so."""
        if self.scale is None:
            return self.data.float()
        return self.bytes() * self.scales()[:, None, :]

    def bytes(self) -> torch.Tensor:
        """The whole numbers of an int8 matrix as [panel, input, 32] in fp32."""
        return self.data.permute(0, 1, 3, 2).reshape(self.data.shape[0], -1, PANEL)[:, : self.inputs].float()

    def scales(self) -> torch.Tensor:
        """The scales of an int8 matrix as [panel, 32]."""
        assert self.scale is not None
        return pad(self.scale, (0, self.data.shape[0] * PANEL - self.outputs)).view(-1, PANEL)


def packed_shape(outputs: int, inputs: int, precision: Precision) -> tuple[int, ...]:
    """The shape of `Matrix.data`."""
    panels = -(-outputs // PANEL)
    return (panels, -(-inputs // 4), PANEL, 4) if precision == "int8" else (panels, inputs, PANEL)


def packed_dtype(precision: Precision) -> torch.dtype:
    """The type of `Matrix.data`."""
    return _DTYPES[precision]


def pack(weight: torch.Tensor, precision: Precision) -> Matrix:
    """Pack a [outputs, inputs] matrix. int8 is symmetric, one scale an output."""
    outputs, inputs = weight.shape
    scale = None
    if precision == "int8":
        scale = weight.abs().amax(dim=1) / 127.0
        weight = torch.round(weight / scale.clamp_min(torch.finfo(torch.float32).tiny)[:, None])
    shape = packed_shape(outputs, inputs, precision)
    filled = pad(weight, (0, -inputs % 4 if precision == "int8" else 0, 0, shape[0] * PANEL - outputs))
    panels = filled.view(shape[0], PANEL, -1)
    data = panels.reshape(shape[0], PANEL, -1, 4).permute(0, 2, 1, 3) if precision == "int8" else panels.transpose(1, 2)
    return Matrix(data=data.to(_DTYPES[precision]).contiguous(), scale=scale, outputs=outputs, inputs=inputs)


def product(x: torch.Tensor, matrix: Matrix) -> torch.Tensor:
    """`x` [row, inputs] times the transposed matrix: [row, outputs]. The reference of the native kernel.

    With int8 weights the activations are quantised too, each row in groups of 64 inputs: a row never depends on its
    neighbours.
    """
    found = _quantised_product(x, matrix) if matrix.scale is not None else torch.matmul(x, matrix.data.float())
    return found.transpose(0, 1).reshape(x.shape[0], -1)[:, : matrix.outputs]


def _quantised_product(x: torch.Tensor, matrix: Matrix) -> torch.Tensor:
    weights = pad(matrix.bytes(), (0, 0, 0, -matrix.inputs % GROUP))
    bytes_, scales = quantise(x)
    total = torch.zeros(weights.shape[0], x.shape[0], PANEL)
    for group in range(scales.shape[1]):
        inputs = slice(group * GROUP, (group + 1) * GROUP)
        exact = torch.matmul(bytes_[:, inputs], weights[:, inputs])
        total += scales[:, group, None] * exact
    return total * matrix.scales()[:, None, :]


def quantise(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Whole numbers from -127 to 127 [row, inputs padded to 64] and their scales [row, group]."""
    groups = pad(x, (0, -x.shape[1] % GROUP)).view(x.shape[0], -1, GROUP)
    scales = groups.abs().amax(dim=2) / 127.0
    inverse = torch.where(scales > 0, 1.0 / scales, 0.0)
    return torch.round(groups * inverse[:, :, None]).flatten(1), scales
