"""What each peer gave on a machine where it was known to be set up well, to tell a peer that is set up wrongly."""

from __future__ import annotations

from collections.abc import Mapping

from benchmarks.limit import Limits

SETTLED = Limits(read_bytes_per_s=25e9, operations_per_s={"fp32": 108.5e9})
"""That machine's own limits: 2 cores, AVX2."""

TOLERATED_SHARE = 0.75
"""Below this share of what is expected, a peer is doubtful."""

TOKENS_PER_S: Mapping[str, Mapping[str, float]] = {
    "vllm": {"512": 263.0, "2000": 171.0, "b1": 21.4, "b8": 86.0, "b32": 142.0},
    "transformers": {"512": 473.0, "2000": 349.0, "b1": 14.0, "b8": 46.0, "b32": 132.0},
    "llamacpp": {"2000": 168.0, "b1": 92.0},
}
"""The smollm2 model, fp32 (llama.cpp: Q4_1), prefill taken out of decode."""


def expected_tokens_per_s(peer: str, case: str, limits: Limits) -> float | None:
    """What a peer should give here: a single stream by how fast this machine reads, all else by the lesser gain."""
    settled = TOKENS_PER_S.get(peer, {}).get(case)
    if settled is None:
        return None
    reading = limits.read_bytes_per_s / SETTLED.read_bytes_per_s
    computing = limits.operations_per_s["fp32"] / SETTLED.operations_per_s["fp32"]
    return settled * (reading if case == "b1" else min(reading, computing))
