"""Whether a category's semantic look-ups pay for themselves: else it reuses equal requests only, and tries again."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class BreakEvenConfig:
    """Bounds of the accounting.

    `lookups_min` look-ups are seen before anything is decided; figures fade with `half_life` look-ups. The category
    is suspended when its hit rate is under `h* / margin` and resumes when a trial shows more than `h* x margin`, so it
    cannot flap at the boundary. While suspended, one request of `trial_every` is looked up to keep measuring.
    """

    lookups_min: int = 200
    half_life: float = 1000.0
    margin: float = 1.25
    trial_every: int = 20

    def __post_init__(self) -> None:
        if self.lookups_min < 1 or self.trial_every < 1:
            raise ValueError("lookups_min and trial_every must be at least 1")
        if not self.half_life > 0:
            raise ValueError("half_life must be over 0")
        if not self.margin >= 1.0:
            raise ValueError("margin must be at least 1")


def break_even(overhead_s: float, model_s: float, fetch_s: float = 0.0) -> float:
    """The hit rate at which look-ups of `overhead_s` pay: h* = t_o / (T - t_f); infinite when they never can.

    `model_s` is what the model takes for an answer that is not cached, `fetch_s` what a hit still costs.
    (Derived from the cost model of Category-Aware Semantic Caching, section 1.1 of our notes on it.)
    """
    saved_s = model_s - fetch_s
    return max(0.0, overhead_s) / saved_s if saved_s > 0 else float("inf")


class BreakEven:
    """The account of one category: hits against look-ups, and what each costs, all as fading means."""

    def __init__(self, config: BreakEvenConfig = BreakEvenConfig()) -> None:
        self._config = config
        self._fade = 0.5 ** (1.0 / config.half_life)
        self._weight = 0.0
        self._hits = 0.0
        self._overhead_s = 0.0
        self._seen = 0
        self._skipped = 0
        self._model_weight = 0.0
        self._model_s = 0.0
        self._suspended = False

    @property
    def is_suspended(self) -> bool:
        """Whether the category does exact reuse only, for now."""
        return self._suspended

    @property
    def hit_rate(self) -> float:
        """Semantic hits of a semantic look-up, of late."""
        return self._hits / self._weight if self._weight else 0.0

    @property
    def needed(self) -> float:
        """The hit rate that pays; 0 until both costs were seen."""
        if not (self._weight and self._model_weight):
            return 0.0
        return break_even(self._overhead_s / self._weight, self._model_s / self._model_weight)

    def can_look_up(self) -> bool:
        """Whether this request is to be looked up semantically. Counts the request when suspended."""
        if not self._suspended:
            return True
        self._skipped += 1
        if self._skipped < self._config.trial_every:
            return False
        self._skipped = 0
        return True

    def looked_up(self, *, hit: bool, overhead_s: float) -> None:
        """Account one semantic look-up and decide anew."""
        self._weight = self._weight * self._fade + 1.0
        self._hits = self._hits * self._fade + hit
        self._overhead_s = self._overhead_s * self._fade + max(0.0, overhead_s)
        self._seen += 1
        self._decide()

    def answered(self, *, model_s: float) -> None:
        """Account what the model took for an answer of this category."""
        self._model_weight = self._model_weight * self._fade + 1.0
        self._model_s = self._model_s * self._fade + max(0.0, model_s)

    def _decide(self) -> None:
        if self._seen < self._config.lookups_min or not self._model_weight:
            return
        needed, margin = self.needed, self._config.margin
        if not self._suspended and self.hit_rate < needed / margin:
            self._suspended, self._seen, self._skipped = True, 0, 0
            self._weight = self._hits = self._overhead_s = 0.0
        elif self._suspended and self.hit_rate > needed * margin:
            self._suspended, self._seen = False, 0

    def check(self) -> None:
        """Assert the invariants."""
        assert 0.0 <= self._hits <= self._weight + 1e-9
        assert 0 <= self._skipped < self._config.trial_every
        assert self._overhead_s >= 0
        assert self._model_s >= 0
