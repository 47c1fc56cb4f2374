"""From the answers of all rounds to rows and ratios: systems against each other and against the machine."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from statistics import median

from benchmarks.contenders import Contender
from benchmarks.engine_cases import MIXED, PREFILL, SCHEMA_BATCH, Case
from benchmarks.expected import TOLERATED_SHARE, expected_tokens_per_s
from benchmarks.limit import Limits
from benchmarks.report import Report
from benchmarks.step_fit import Growth
from covey.model.config import ModelConfig

OURS = "covey"
LIMIT, PRODUCTS = "limit", "products"
STEP_METRICS = {"base_s": "step_s", "row_s": "step_s_per_row", "token_s": "step_s_per_context_token"}


@dataclass(slots=True)
class Rates:
    """Tokens a second of one system under one setting, by case, one number a round."""

    contender: Contender
    version: str
    rounds: dict[str, list[float]] = field(default_factory=dict)

    def add(self, case: str, tokens_per_s: float) -> None:
        """Add a round of a case."""
        self.rounds.setdefault(case, []).append(tokens_per_s)


@dataclass(slots=True)
class Figures:
    """All that a run found out. `products_s` are seconds of the fastest bare products by (precision, rows, sampled)."""

    config: ModelConfig
    cases: tuple[Case, ...]
    limits: Limits
    rates: list[Rates]
    kv_bytes_per_token: Mapping[str, float]
    products_s: Mapping[tuple[str, int, int], list[float]]
    growth: dict[str, tuple[Growth, Growth]] = field(default_factory=dict)
    """By precision: as measured, and as arithmetic says."""

    def write(self, report: Report) -> None:
        """Add every row and every ratio."""
        self._add_machine(report)
        for rates in self.rates:
            for case in self.cases:
                report.add(
                    case=f"{case.name}-{rates.contender.precision}",
                    system=rates.contender.name,
                    metric=case.metric,
                    unit="tokens/s",
                    samples=rates.rounds.get(case.name, []),
                    at="p50",
                )
        for ours in self._ours():
            for case in self.cases:
                self._add_ratios(report, ours, case)
        for precision, (measured, due) in self.growth.items():
            _add_growth(report, precision, measured, due)

    def doubts(self) -> Iterator[str]:
        """Peers that are so slow that they are probably set up wrongly; each in its fastest setting."""
        for peer in self._peers():
            for case in self.cases:
                expected = expected_tokens_per_s(peer, case.name, self.limits)
                found = median(self.fastest(peer, case.name) or [0.0])
                if expected is not None and 0.0 < found < TOLERATED_SHARE * expected:
                    yield f"{peer} is doubtful at {case.name}: {found:.3g} tokens/s, {expected:.3g} were expected here"

    def fastest(self, peer: str, case: str) -> list[float]:
        """The rounds of a peer's fastest setting; empty where it has none."""
        settings = [rates.rounds.get(case, []) for rates in self.rates if rates.contender.peer == peer]
        return max(settings, key=lambda rounds: median(rounds or [0.0]), default=[])

    def limit_tokens_per_s(self, case: Case, precision: str) -> float | None:
        """The roofline of a case; None where none is defined."""
        if case.metric == PREFILL:
            return self.limits.prefill_tokens_per_s(self.config, case.rows, precision=precision)
        if case.metric == MIXED:
            return None
        return self.limits.decode_tokens_per_s(
            self.config,
            precision=precision,
            batch=case.rows,
            context=case.context,
            kv_bytes_per_token=self.kv_bytes_per_token.get(precision, 0.0),
        )

    def products_tokens_per_s(self, case: Case, precision: str) -> list[float]:
        """Tokens a second, round by round, if there were nothing but the products, in the fastest code."""
        rows = products_rows(case)
        return [rows / seconds for seconds in self.products_s.get((precision, rows, case.sampled), [])]

    def _ours(self) -> list[Rates]:
        return [rates for rates in self.rates if rates.contender.is_ours]

    def _peers(self) -> list[str]:
        return list(dict.fromkeys(rates.contender.peer for rates in self.rates if rates.contender.peer))

    def _add_machine(self, report: Report) -> None:
        limits = self.limits
        reads = [limits.read_bytes_per_s / 1e9]
        report.add(case="machine", system=LIMIT, metric="read_gb_per_s", unit="GB/s", samples=reads)
        for precision, rate in limits.operations_per_s.items():
            metric = f"product_{precision}_gop_per_s"
            report.add(case="machine", system=LIMIT, metric=metric, unit="Gop/s", samples=[rate / 1e9])
        for precision, size in self.kv_bytes_per_token.items():
            metric = "kv_bytes_per_token"
            report.add(case=f"memory-{precision}", system=OURS, metric=metric, unit="bytes", samples=[size])

    def _add_ratios(self, report: Report, ours: Rates, case: Case) -> None:
        mine, precision = ours.rounds.get(case.name, []), ours.contender.precision
        if not mine:
            return
        name = f"{case.metric}/{case.name}-{precision}"
        if case.ours_only:
            free = ours.rounds.get(f"b{SCHEMA_BATCH}", [])
            _add_ratio(report, f"{name}/unconstrained", mine, free)
            return
        for peer in self._peers():
            _add_ratio(report, f"{name}/{peer}", mine, self.fastest(peer, case.name))
        products = self.products_tokens_per_s(case, precision)
        if products and case.metric != MIXED:
            where = {"case": f"{case.name}-{precision}", "metric": case.metric, "unit": "tokens/s"}
            report.add(**where, system=PRODUCTS, samples=products, at="p50")
            _add_ratio(report, f"{name}/{PRODUCTS}", mine, products)
        best = self.limit_tokens_per_s(case, precision)
        if best is not None:
            where = {"case": f"{case.name}-{precision}", "metric": case.metric, "unit": "tokens/s"}
            report.add(**where, system=LIMIT, samples=[best], at="p50")
            report.ratios[f"{name}/{LIMIT}"] = median(mine) / best


def products_rows(case: Case) -> int:
    """Rows of the bare products that a case is compared with: a long prompt's rate is that of 512 of its tokens."""
    return min(case.rows, 512) if case.metric == PREFILL else case.rows


def _add_ratio(report: Report, name: str, ours: list[float], theirs: list[float]) -> None:
    """The median over the rounds that both have."""
    ratios = [mine / other for mine, other in zip(ours, theirs, strict=False)]
    if ratios:
        report.ratios[name] = median(ratios)


def _add_growth(report: Report, precision: str, measured: Growth, due: Growth) -> None:
    case = f"fit-{precision}"
    for part, metric in STEP_METRICS.items():
        for system, growth in ((OURS, measured), (LIMIT, due)):
            report.add(case=case, system=system, metric=metric, unit="s", samples=[getattr(growth, part)])
        if getattr(measured, part) > 0:
            report.ratios[f"{metric}/{case}/{LIMIT}"] = getattr(due, part) / getattr(measured, part)
    report.add(case=case, system=OURS, metric="r2", unit="", samples=[measured.r2])
