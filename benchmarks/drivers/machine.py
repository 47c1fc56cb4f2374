"""This machine as a driver: its limits, and the bare products of a model."""

from __future__ import annotations

import os
import sys
from importlib.metadata import version
from typing import Any

import torch

from benchmarks.drivers.lines import private_output, serve
from benchmarks.limit import measure
from benchmarks.products import Products
from covey.clock import MonotonicClock
from covey.model.matrix import Precision
from covey.model.source import resolve


class Machine:
    """`limits()` are those of `benchmarks.limit`; `products(...)` are the seconds of `benchmarks.products`."""

    def __init__(self, model: str) -> None:
        torch.set_num_threads(len(os.sched_getaffinity(0)))
        self._config = resolve(model).config()
        self._products: dict[Precision, Products] = {}

    def limits(self) -> dict[str, Any]:
        """Bytes read a second, and operations a second by precision."""
        found = measure(MonotonicClock())
        return {"read_bytes_per_s": found.read_bytes_per_s, "operations_per_s": dict(found.operations_per_s)}

    def products(self, precision: Precision, rows: int, sampled: int) -> dict[str, float]:
        """Seconds of a pass by code, and of the `fastest`; the matrices of one precision are kept between calls."""
        if precision not in self._products:
            self._products[precision] = Products(self._config, precision, MonotonicClock())
        return self._products[precision].seconds(rows, sampled)


def main() -> None:
    """Measure for the model that the command line names."""
    lines = private_output()
    torch.set_grad_enabled(False)
    machine = Machine(sys.argv[1])
    serve(version("covey"), {"limits": machine.limits, "products": machine.products}, lines)


if __name__ == "__main__":
    main()
