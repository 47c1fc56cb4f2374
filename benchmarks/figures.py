"""From samples to figures: latencies, goodput and throughput of a system, and how a peer compares."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import mean, median

from benchmarks.load import Sample
from benchmarks.report import Report

ALONE = "b1"
"""The case of requests that come one at a time: decoding at batch 1."""

STATISTICS = ("mean", "p50", "p99")
TIMES = ("ttft_s", "tpot_s", "e2e_s")
MIB = 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class Goal:
    """What makes a request good: the service-level objective that goodput counts by."""

    ttft_s: float = 2.0
    tpot_s: float = 0.2


@dataclass(slots=True)
class Measured:
    """What one system did: for each case the samples of each round; start times and memory of each start."""

    cases: dict[str, list[list[Sample]]] = field(default_factory=dict)
    ready_s: list[float] = field(default_factory=list)
    memory_bytes: dict[str, list[int]] = field(default_factory=dict)
    others_cores: list[float] = field(default_factory=list)
    """In each round, how many cores were busy with something else meanwhile."""

    def add(self, case: str, samples: list[Sample]) -> None:
        """Add a round of a case."""
        self.cases.setdefault(case, []).append(samples)

    def add_start(self, ready_s: float, memory_bytes: Mapping[str, int]) -> None:
        """Add how long a start took, and the memory of each process when idle."""
        self.ready_s.append(ready_s)
        for name, size in memory_bytes.items():
            self.memory_bytes.setdefault(name, []).append(size)


def add_rows(report: Report, system: str, measured: Measured, goal: Goal) -> None:
    """Add all figures of one system, over all rounds together."""
    report.add(case="start", system=system, metric="ready_s", unit="s", samples=measured.ready_s)
    for name, sizes in measured.memory_bytes.items():
        mib = [size / MIB for size in sizes]
        report.add(case="idle", system=system, metric=f"pss_{name}", unit="MiB", samples=mib)
    report.add(case="machine", system=system, metric="others_cores", unit="cores", samples=measured.others_cores)
    for case, rounds in measured.cases.items():
        samples = [sample for round_samples in rounds for sample in round_samples]
        _add_latencies(report, case, system, samples)
        if case == ALONE:
            rates = decode_rates(samples)
            report.add(case=case, system=system, metric="decode_tokens_per_s", unit="tokens/s", samples=rates)
            continue
        met = [float(is_good(sample, goal)) for sample in samples]
        report.add(case=case, system=system, metric="goodput", unit="share", samples=met)
        throughput = [output_tokens_per_s(round_samples) for round_samples in rounds]
        report.add(case=case, system=system, metric="output_tokens_per_s", unit="tokens/s", samples=throughput)
        failed = [sum(1.0 for sample in round_samples if sample.error) for round_samples in rounds]
        report.add(case=case, system=system, metric="failed", unit="requests", samples=failed)


def _add_latencies(report: Report, case: str, system: str, samples: Sequence[Sample]) -> None:
    good = [sample for sample in samples if not sample.error]
    series = {
        "ttft_s": [sample.ttft_s for sample in good],
        "tpot_s": [sample.tpot_s for sample in good if sample.output_tokens > 1],
        "itl_s": [gap for sample in good for gap in sample.gaps_s],
        "e2e_s": [sample.e2e_s for sample in good],
    }
    for metric, values in series.items():
        for at in STATISTICS:
            report.add(case=case, system=system, metric=metric, unit="s", samples=values, at=at)


def add_ratios(report: Report, peer: str, ours: Measured, theirs: Measured) -> None:
    """Compare Covey with a peer, round by round."""
    for case, our_rounds in ours.cases.items():
        pairs = list(zip(our_rounds, theirs.cases.get(case, []), strict=False))
        for metric in TIMES:
            both = [(_mean_time(a, metric), _mean_time(b, metric)) for a, b in pairs]
            _add_ratio(report, f"{metric}/{case}/{peer}", [(b, a) for a, b in both])
        if case == ALONE:
            rates = [(mean(decode_rates(a)), mean(decode_rates(b))) for a, b in pairs if _both_decode(a, b)]
            _add_ratio(report, f"decode_tokens_per_s/{case}/{peer}", rates)
        else:
            throughput = [(output_tokens_per_s(a), output_tokens_per_s(b)) for a, b in pairs]
            _add_ratio(report, f"output_tokens_per_s/{case}/{peer}", throughput)


def _add_ratio(report: Report, name: str, pairs: Sequence[tuple[float, float]]) -> None:
    """The median of better ÷ worse over the rounds in which both have a figure."""
    ratios = [above / below for above, below in pairs if above > 0 and below > 0]
    if ratios:
        report.ratios[name] = median(ratios)


def _mean_time(samples: Sequence[Sample], metric: str) -> float:
    """Mean of a time over the answered requests, in seconds; 0 where there is none."""
    good = [s for s in samples if not s.error and (metric != "tpot_s" or s.output_tokens > 1)]
    return mean(getattr(sample, metric) for sample in good) if good else 0.0


def _both_decode(ours: Sequence[Sample], theirs: Sequence[Sample]) -> bool:
    return bool(decode_rates(ours)) and bool(decode_rates(theirs))


def decode_rates(samples: Sequence[Sample]) -> list[float]:
    """Tokens a second of each request after its first token."""
    return [1.0 / s.tpot_s for s in samples if not s.error and s.output_tokens > 1 and s.tpot_s > 0]


def output_tokens_per_s(samples: Sequence[Sample]) -> float:
    """Throughput of a whole loop, from the first departure to the last end."""
    span_s = max(s.ended for s in samples) - min(s.started for s in samples)
    return sum(s.output_tokens for s in samples if not s.error) / span_s


def is_good(sample: Sample, goal: Goal) -> bool:
    """Whether a request met the goal."""
    return not sample.error and sample.ttft_s <= goal.ttft_s and sample.tpot_s <= goal.tpot_s
