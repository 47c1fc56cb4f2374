"""Looser thresholds while the model behind is overloaded, as long as the false-hit budget lasts."""

from __future__ import annotations

from dataclasses import dataclass

from covey.policy.false_hits import Estimate


@dataclass(frozen=True, slots=True, kw_only=True)
class RelaxationConfig:
    """When load counts: `load` is queue wait over objective, smoothed by a mean with time constant `smooth_s`.

    Relaxation begins over `load_low`, is full at `load_high`, and moves only when the smoothed load has changed by
    `dead_band` of that range, so that noise does not move thresholds.
    """

    load_low: float = 0.5
    load_high: float = 1.5
    smooth_s: float = 10.0
    dead_band: float = 0.1

    def __post_init__(self) -> None:
        if not 0.0 <= self.load_low < self.load_high:
            raise ValueError("load_low must be under load_high, and neither negative")
        if not self.smooth_s > 0:
            raise ValueError("smooth_s must be over 0")
        if not 0.0 <= self.dead_band < 1.0:
            raise ValueError("dead_band must lie in [0, 1)")


class Relaxation:
    """The degree of relaxation, 0 to 1, of one model's traffic in one category.

    The form is lambda = clamp((rho - rho_lo) / (rho_hi - rho_lo), 0, 1) with tau_eff = max(tau_min, tau - d_tau lambda)
    and ttl_eff = min(ttl_max, ttl (1 + beta lambda)); a reconstruction: the paper's own numbers could not be read.
    """

    def __init__(self, config: RelaxationConfig = RelaxationConfig()) -> None:
        self._config = config
        self._load = 0.0
        self._at: float | None = None
        self._degree = 0.0

    @property
    def degree(self) -> float:
        """What held after the last observation."""
        return self._degree

    def observe(self, load: float, now: float) -> float:
        """Take one request's `load` at `now` (seconds) and return the degree; a load that is no number counts as 0."""
        load = load if 0.0 <= load < float("inf") else 0.0
        if self._at is None:
            self._load = load
        else:
            elapsed_s = max(0.0, now - self._at)
            share = elapsed_s / (elapsed_s + self._config.smooth_s)
            self._load += share * (load - self._load)
        self._at = now if self._at is None else max(self._at, now)
        span = self._config.load_high - self._config.load_low
        wanted = min(1.0, max(0.0, (self._load - self._config.load_low) / span))
        if abs(wanted - self._degree) >= self._config.dead_band or wanted in (0.0, 1.0):
            self._degree = wanted
        return self._degree

    def check(self) -> None:
        """Assert the invariants."""
        assert 0.0 <= self._degree <= 1.0
        assert self._load >= 0.0


class RelaxationBudget:
    """Stops relaxation when too many hits are wrong, and lets it resume when they are clearly fewer again.

    It stops when the estimate passes `budget`, with at least `judged_min` verdicts; it resumes under `resume` of the
    budget. With fewer verdicts it holds its state: relaxing blindly spends a budget nobody has counted.
    """

    def __init__(self, budget: float, *, judged_min: float = 10.0, resume: float = 0.7) -> None:
        if not 0.0 <= budget <= 1.0:
            raise ValueError(f"budget must lie in [0, 1], is {budget}")
        if not 0.0 < resume <= 1.0:
            raise ValueError(f"resume must lie in (0, 1], is {resume}")
        self._budget, self._judged_min, self._resume = budget, judged_min, resume
        self._spent = False

    @property
    def is_spent(self) -> bool:
        """Whether relaxation is stopped."""
        return self._spent

    def observe(self, estimate: Estimate) -> bool:
        """Take the current estimate; returns whether relaxation may go on."""
        if estimate.judged >= self._judged_min:
            if estimate.share > self._budget:
                self._spent = True
            elif estimate.share <= self._resume * self._budget:
                self._spent = False
        return not self._spent
