"""What `covey bench kv` found out, as rows and ratios."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median

from benchmarks.kv_cases import LOOKUPS, OPERATIONS, TRANSPORTS, Load
from benchmarks.report import Report, Row, interval


@dataclass(slots=True)
class Figures:
    """Samples of one run, round by round. Rates are bytes a second; a peer's case has no transport but its own."""

    versions: dict[str, str] = field(default_factory=dict)
    """What each system says it is."""
    ours: dict[tuple[str, Load, str], list[float]] = field(default_factory=lambda: defaultdict(list))
    """By operation, load and transport."""
    theirs: dict[tuple[str, str, Load], list[float]] = field(default_factory=lambda: defaultdict(list))
    """By peer, operation and load."""
    memcpy: dict[Load, list[float]] = field(default_factory=lambda: defaultdict(list))
    lookups_s: dict[int, list[float]] = field(default_factory=lambda: defaultdict(list))
    empty_calls_s: dict[int, list[float]] = field(default_factory=lambda: defaultdict(list))
    rpcs_s: dict[int, list[float]] = field(default_factory=lambda: defaultdict(list))
    """Of an RPC of our own with an empty request: what authentication, tracing and codec add to an empty call."""
    moved_share: float = 0.0

    def system(self, name: str) -> str:
        """A system's name in rows: with its version, which for `valkey` also says which engine it was."""
        return f"{name} ({self.versions[name]})" if self.versions.get(name) else name

    def write(self, report: Report) -> None:
        """Add all rows and ratios."""
        for (operation, load, transport), rates in self.ours.items():
            _add_rate(report, load.case(transport), self.system("covey"), operation, rates)
        for (peer, operation, load), rates in self.theirs.items():
            _add_rate(report, load.case("tcp"), self.system(peer), operation, rates)
        for load, rates in self.memcpy.items():
            _add_rate(report, load.case(), "memcpy", "copy", rates)
        for blocks in LOOKUPS:
            case = f"{blocks}-blocks"
            _add(report, case, self.system("covey"), "lookup_s", "s", self.lookups_s[blocks])
            _add(report, case, "empty gRPC call", "lookup_s", "s", self.empty_calls_s[blocks])
            _add(report, case, "empty RPC of ours", "lookup_s", "s", self.rpcs_s[blocks])
        _add(report, "3-to-4-nodes", self.system("covey"), "moved_blocks", "share", [self.moved_share])
        self._add_ratios(report)

    def _add_ratios(self, report: Report) -> None:
        peers = sorted({peer for peer, _, _ in self.theirs})
        for load in dict.fromkeys(load for _, load, _ in self.ours):
            for operation in OPERATIONS:
                for transport in TRANSPORTS:
                    rates = self.ours[operation, load, transport]
                    name = f"{operation}_bytes_per_s/{load.case(transport)}"
                    for peer in peers:
                        _add_ratio(report, f"{name}/{peer}", rates, self.theirs[peer, operation, load])
                    _add_ratio(report, f"{name}/limit", rates, self.memcpy[load])
        for blocks in LOOKUPS:
            _add_ratio(report, f"lookup_s/{blocks}-blocks/limit", self.empty_calls_s[blocks], self.lookups_s[blocks])
            _add_ratio(report, f"lookup_s/{blocks}-blocks/rpc", self.rpcs_s[blocks], self.lookups_s[blocks])


def _add_rate(report: Report, case: str, system: str, operation: str, rates: Sequence[float]) -> None:
    _add(report, case, system, f"{operation}_bytes_per_s", "B/s", rates)


def _add(report: Report, case: str, system: str, metric: str, unit: str, samples: Sequence[float]) -> None:
    """A median with its 95 % interval."""
    if samples:
        value, lo, hi = interval(samples, "p50")
        report.rows.append(
            Row(case=case, system=system, metric=metric, unit=unit, value=value, lo=lo, hi=hi, n=len(samples))
        )


def _add_ratio(report: Report, name: str, above: Sequence[float], below: Sequence[float]) -> None:
    """The median of the rounds' ratios: each round measured both close together."""
    ratios = [a / b for a, b in zip(above, below, strict=False) if b > 0]
    if ratios:
        report.ratios[name] = median(ratios)
