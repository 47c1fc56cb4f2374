"""What came of the streams as rows with intervals and as ratios."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import StrEnum

import numpy as np

from benchmarks.cache_ours import Played
from benchmarks.cache_rules import Best, Outcomes
from benchmarks.drivers.questions import FALSE, RIGHT
from benchmarks.report import Report, Row
from covey.policy.evidence import FEATURES
from covey.policy.reuse_learning import Learnt

RESAMPLES = 1000
ALL, SINGLE = "all", "single-turn"


class System(StrEnum):
    """Who was asked. A rule is our own code for what a package does; it stands for a package that cannot be had."""

    COVEY = "covey"
    CLASSIFIED = "covey-classified"
    UNIFORM = "uniform"
    GPTCACHE = "gptcache"
    REDISVL = "redisvl"
    VCACHE = "vcache-rule"
    GPTCACHE_RULE = "gptcache-rule"
    REDISVL_RULE = "redisvl-rule"


RULES = {System.GPTCACHE: System.GPTCACHE_RULE, System.REDISVL: System.REDISVL_RULE}
PEER_WORDS = {
    System.UNIFORM: "uniform",
    System.GPTCACHE: "gptcache",
    System.REDISVL: "redisvl",
    System.VCACHE: "vcache",
    System.GPTCACHE_RULE: "gptcache",
    System.REDISVL_RULE: "redisvl",
}


class Figures:
    """Everything that was measured, by system and set."""

    def __init__(self, asked: Mapping[str, int], dialogues: str) -> None:
        self.asked = dict(asked)
        self.played: dict[System, dict[str, Played]] = {}
        self.notes: list[str] = []
        self._dialogues = dialogues
        self._stale: dict[str, dict[str, tuple[int, int]]] = {}
        self._last: dict[str, Outcomes] = {}
        self._single: Best | None = None

    def note(self, text: str) -> None:
        """A line for the reader of the table."""
        self.notes.append(text)

    def learnt(self, name: str, learnt: Learnt) -> None:
        """Say what a category's decision weighs."""
        if learnt.model is None:
            self.note(f"{name}: nothing to be had, equal requests only")
            return
        weights = sorted(zip(learnt.model.weights, FEATURES, strict=True), reverse=True)
        told = ", ".join(f"{feature} {weight:.2f}" for weight, feature in weights if weight >= 0.05)
        right, false = 100.0 * learnt.right / learnt.asked, 100.0 * learnt.false / learnt.asked
        self.note(f"{name}: learnt at {right:.2f} right and {false:.2f} false hits per 100; weights: {told}")

    def add(self, system: System, played: Mapping[str, Played]) -> None:
        """Take a system's streams."""
        self.played[system] = dict(played)

    def stale(self, system: str, name: str, outcomes: Outcomes, count: int) -> None:
        """Take a system's stale hits in one set, and its other hits while answers changed."""
        hits = int((outcomes == RIGHT).sum()) + int((outcomes == FALSE).sum()) + count
        self._stale.setdefault(system, {})[name] = (count, hits)

    def last_message(self, system: str, outcomes: Outcomes) -> None:
        """Take what last-message keys give in dialogues at a threshold."""
        self._last[system] = outcomes

    def single_turn(self, best: Best) -> None:
        """Take the best threshold over the sets without dialogues."""
        self._single = best
        self.note(f"uniform over {SINGLE}: setting {best.setting:g}")

    def write(self, report: Report) -> None:
        """Write rows and ratios."""
        for system, played in self.played.items():
            for name in self.asked:
                _hits(report, name, system, played[name].outcomes)
                _times(report, name, system, [played[name]])
            _hits(report, ALL, system, self._joined(played))
            _times(report, ALL, system, list(played.values()))
        for word, outcomes in self._last.items():
            _hits(report, self._dialogues, word, outcomes)
        for word, counts in self._stale.items():
            for name, (count, _) in counts.items():
                report.rows.append(_share(name, word, "stale_hits", count, self.asked[name]))
            stale, hits = (sum(found) for found in zip(*counts.values(), strict=True))
            report.rows.append(_share(ALL, word, "stale_hits", stale, sum(self.asked.values())))
            if hits:
                report.rows.append(_share(ALL, word, "stale_of_100_hits", stale, hits))
        self._ratios(report)

    def _ratios(self, report: Report) -> None:
        ours = self.played[System.COVEY]
        for system, word in PEER_WORDS.items():
            theirs = self.played.get(system)
            if theirs is None:
                continue
            for name in self.asked:
                _ratio(report, name, word, ours[name].outcomes, theirs[name].outcomes)
            _ratio(report, ALL, word, self._joined(ours), self._joined(theirs))
            _faster(report, word, ours, theirs)
        if self._single is not None:
            names = list(self._single.outcomes)
            mine = np.concatenate([ours[name].outcomes for name in names])
            _ratio(report, SINGLE, "uniform", mine, np.concatenate(list(self._single.outcomes.values())))
            _hits(report, SINGLE, System.COVEY, mine)
            _hits(report, SINGLE, System.UNIFORM, np.concatenate(list(self._single.outcomes.values())))
        classified = self.played.get(System.CLASSIFIED)
        for name, played in (classified or {}).items():
            found = sum(category == name for category in played.categories)
            report.rows.append(_share(name, System.CLASSIFIED, "classified_rightly", found, len(played.categories)))

    def _joined(self, played: Mapping[str, Played]) -> Outcomes:
        return np.concatenate([played[name].outcomes for name in self.asked])


def _hits(report: Report, case: str, system: str, outcomes: Outcomes) -> None:
    for metric, kind in (("right_hits", RIGHT), ("false_hits", FALSE)):
        report.rows.append(_share(case, system, metric, int((outcomes == kind).sum()), len(outcomes)))


def _share(case: str, system: str, metric: str, count: int, asked: int) -> Row:
    """A count per 100 questions. Resampling questions with replacement makes its bootstrap a binomial draw."""
    draws = np.random.default_rng(0).binomial(asked, count / asked, RESAMPLES) * (100.0 / asked)
    lo, hi = np.quantile(draws, (0.025, 0.975))
    return Row(
        case=case, system=system, metric=metric, unit="per 100", value=100.0 * count / asked, lo=lo, hi=hi, n=asked
    )


def _times(report: Report, case: str, system: str, played: Sequence[Played]) -> None:
    lookups = np.array([s for one in played for s in one.lookup_s])
    for at, quantile in (("p50", 0.5), ("p99", 0.99)):
        if len(lookups):
            lo, value, hi = _quantile(lookups, quantile)
            row = Row(
                case=case, system=system, metric=f"lookup_s_{at}", unit="s", value=value, lo=lo, hi=hi, n=len(lookups)
            )
            report.rows.append(row)
    memory = sum(one.memory_bytes for one in played)
    if memory:
        value = float(memory)
        report.rows.append(
            Row(case=case, system=system, metric="memory_bytes", unit="B", value=value, lo=value, hi=value, n=1)
        )


def _quantile(samples: np.ndarray, at: float) -> tuple[float, float, float]:
    """A quantile and its distribution-free 95 % interval from order statistics."""
    ordered, count = np.sort(samples), len(samples)
    spread = 1.96 * np.sqrt(count * at * (1.0 - at))
    low = int(np.clip(np.floor(count * at - spread), 0, count - 1))
    high = int(np.clip(np.ceil(count * at + spread), 0, count - 1))
    return float(ordered[low]), float(np.quantile(ordered, at)), float(ordered[high])


def _ratio(report: Report, case: str, word: str, ours: Outcomes, theirs: Outcomes) -> None:
    """Right hits of ours over theirs, with a paired bootstrap; a peer without any counts as if it had one."""
    mine, other = ours == RIGHT, theirs == RIGHT
    if not mine.any() and not other.any():
        return
    value = float(mine.sum()) / max(1.0, float(other.sum()))
    both = np.array([(mine & other).sum(), (mine & ~other).sum(), (~mine & other).sum(), (~mine & ~other).sum()])
    draws = np.random.default_rng(0).multinomial(len(mine), both / len(mine), RESAMPLES)
    ratios = (draws[:, 0] + draws[:, 1]) / np.maximum(1, draws[:, 0] + draws[:, 2])
    lo, hi = np.quantile(ratios, (0.025, 0.975))
    name = "right_hits_ratio"
    report.rows.append(
        Row(case=case, system=word, metric=name, unit="x", value=value, lo=float(lo), hi=float(hi), n=len(mine))
    )
    report.ratios[f"right_hits/{case}/{word}"] = value


def _faster(report: Report, word: str, ours: Mapping[str, Played], theirs: Mapping[str, Played]) -> None:
    mine = [s for one in ours.values() for s in one.lookup_s]
    other = [s for one in theirs.values() for s in one.lookup_s]
    if mine and other:
        report.ratios[f"lookup_s/{ALL}/{word}"] = float(np.median(other)) / float(np.median(mine))
