"""What every benchmark writes: rows with an interval, ratios, the machine; as a table and as one JSON object."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from random import Random
from statistics import mean, median, quantiles

from rich.console import Console
from rich.table import Table

RESAMPLES = 500


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One figure: `lo` and `hi` bound it with 95 % confidence over `n` samples."""

    case: str
    system: str
    metric: str
    unit: str
    value: float
    lo: float
    hi: float
    n: int


@dataclass(slots=True)
class Report:
    """The result of one benchmark run. A ratio over 1 always means that Covey is better."""

    bench: str
    rows: list[Row] = field(default_factory=list)
    ratios: dict[str, float] = field(default_factory=dict)

    def add(
        self, *, case: str, system: str, metric: str, unit: str, samples: Sequence[float], at: str = "mean"
    ) -> None:
        """Add a figure: the `mean`, `p50` or `p99` of `samples`, with a bootstrap interval."""
        if not samples:
            return
        value, lo, hi = interval(samples, at)
        name = metric if at == "mean" else f"{metric}_{at}"
        self.rows.append(
            Row(case=case, system=system, metric=name, unit=unit, value=value, lo=lo, hi=hi, n=len(samples))
        )

    def value(self, *, case: str, system: str, metric: str) -> float | None:
        """A figure that was added, if it was."""
        found = (row.value for row in self.rows if (row.case, row.system, row.metric) == (case, system, metric))
        return next(found, None)

    def json(self) -> str:
        """The one object of a run."""
        return json.dumps(
            {
                "bench": self.bench,
                "version": version("covey"),
                "date": datetime.now(UTC).isoformat(timespec="seconds"),
                "machine": machine(),
                "rows": [asdict(row) for row in self.rows],
                "ratios": self.ratios,
            },
            indent=2,
        )

    def write(self, target: str | None) -> None:
        """Write the object to a file, or to standard output for `-`."""
        if target == "-":
            print(self.json())
        elif target is not None:
            Path(target).write_text(self.json() + "\n")

    def print(self, console: Console) -> None:
        """Draw the rows as a table, and the ratios as another."""
        table = Table(title=f"covey bench {self.bench} · {machine()['cpu']}, {machine()['cores']} cores")
        for name in ("case", "system", "metric", "value", "95 %", "n"):
            table.add_column(name, justify="right" if name in {"value", "95 %", "n"} else "left")
        for row in self.rows:
            span = f"{row.lo:.4g}–{row.hi:.4g}"
            table.add_row(row.case, row.system, row.metric, f"{row.value:.4g} {row.unit}", span, str(row.n))
        console.print(table)
        if self.ratios:
            ratios = Table(title="ratios: over 1, Covey is better")
            ratios.add_column("metric/case/peer", overflow="fold")
            ratios.add_column("ratio", justify="right")
            for name, ratio in self.ratios.items():
                ratios.add_row(name, f"{ratio:.3g}")
            console.print(ratios)


def interval(samples: Sequence[float], at: str) -> tuple[float, float, float]:
    """A statistic with its 95 % interval by percentile bootstrap (seeded, so that a report is reproducible)."""
    rng = Random(0)  # noqa: S311 - resampling
    draws = sorted(statistic([rng.choice(samples) for _ in samples], at) for _ in range(RESAMPLES))
    return statistic(samples, at), draws[int(0.025 * RESAMPLES)], draws[int(0.975 * RESAMPLES) - 1]


def statistic(samples: Sequence[float], at: str) -> float:
    """`mean`, `p50` or `p99` of some samples."""
    if at == "mean":
        return mean(samples)
    if at == "p50" or len(samples) == 1:
        return median(samples)
    return quantiles(samples, n=100, method="inclusive")[98]


def machine() -> dict[str, object]:
    """What the figures were measured on."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(memory / 2**30, 1),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
    }


def _cpu() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or "unknown"
