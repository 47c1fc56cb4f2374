"""Holds every system to the vector instructions of an older processor, as far as software can be told to.

So a machine with AVX-512 says how systems stand to one another on one without. Its clock and caches stay its own.
"""

from __future__ import annotations

import os
from typing import Any

AVX2 = "avx2"
_NAME = "COVEY_BENCH_ISA"


def held_to(isa: str) -> dict[str, str]:
    """The environment that holds a driver, torch, oneDNN and MKL to an instruction set."""
    upper = isa.upper()
    return {_NAME: isa, "ATEN_CPU_CAPABILITY": isa, "ONEDNN_MAX_CPU_ISA": upper, "MKL_ENABLE_INSTRUCTIONS": upper}


def asked() -> str | None:
    """What this process is held to; None for all that the processor has."""
    return os.environ.get(_NAME)


def hide_avx512(torch: Any) -> None:
    """Make libraries that ask torch for the processor's abilities choose their AVX2 code, if that is asked for."""
    if asked() == AVX2:
        torch.cpu._is_avx512_supported = lambda: False  # noqa: SLF001 - what such libraries ask
        torch.cpu._is_avx512_bf16_supported = lambda: False  # noqa: SLF001
