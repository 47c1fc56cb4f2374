"""Meta Ranking on recorded answers, with a served model as the weak judge, beside simpler ways to find errors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Final

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import Progress

from benchmarks.recorded_pairs import Pair, gsm8k
from benchmarks.report import Report, Row
from covey.model.plan import Row as ModelRow
from covey.model.plan import SampleSpec, StepPlan
from covey.model.runner import TorchRunner, open_runner
from covey.model.tokenizer import Tokenizer, open_tokenizer
from covey.policy.meta_ranking import Comparison, MetaRanking, Reference, choose_references

TARGETS, QUICK_TARGETS = 90, 16
LEARNT_ON = 0.33
"""Share of the targets whose worth sets each method's threshold; the others are measured."""
QUESTION_WORDS, ANSWER_WORDS = 60, 90
CONTEXT_TOKENS: Final = 2048
RESAMPLES = 1000
TEMPLATE = (
    "Two answers to two different questions. Which answer is more likely to be correct?\n\n"
    "Question 1: {first.text}\nAnswer 1: {first.small_answer}\n\n"
    "Question 2: {second.text}\nAnswer 2: {second.small_answer}\n\n"
    "Reply with the number of the more reliable answer only."
)
ASKED = "Question: {pair.text}\nAnswer: {pair.small_answer}\n\nIs this answer correct? Reply yes or no only."


class ServedJudge:
    """A model asked for one word: the difference of the logits of two words is what it thinks."""

    def __init__(self, model: str, cache_dir: Path) -> None:
        self._tokenizer: Tokenizer = open_tokenizer(model)
        self._runner: TorchRunner = open_runner(
            model, cache_dir=cache_dir, n_blocks=CONTEXT_TOKENS // 32, block_size=32, precision="int8"
        )
        self.asked = 0

    def compare(self, first: Pair, second: Pair, tie: float) -> int:
        """1 when it thinks the first answer the more reliable, -1 the second; 0 within `tie` of logit."""
        leaning = self._leaning(TEMPLATE.format(first=_short(first), second=_short(second)), "1", "2")
        return 0 if abs(leaning) <= tie else (1 if leaning > 0 else -1)

    def confidence(self, pair: Pair) -> float:
        """How much more it would say yes than no, asked about one answer alone."""
        return self._leaning(ASKED.format(pair=_short(pair)), "yes", "no")

    def close(self) -> None:
        """Give the memory back."""
        self._runner.close()

    def _leaning(self, question: str, one: str, other: str) -> float:
        self.asked += 1
        tokens = self._tokenizer.encode_chat([{"role": "user", "content": question}], add_generation_prompt=True)
        tokens = tokens[-(CONTEXT_TOKENS - 1) :]
        places = [self._tokenizer.encode(word, add_special=False)[0] for word in (one, other)]
        # The larger of two logits is the one drawn when all others are far below; their difference needs both.
        spec = SampleSpec(logprobs=self._runner.info.vocab_size)
        row = ModelRow(seq=0, tokens=tuple(tokens), start=0, blocks=tuple(range(-(-len(tokens) // 32))), sample=spec)
        top = dict(self._runner.step(StepPlan(rows=(row,))).sampled[0].draws[0].top)
        return top[places[0]] - top[places[1]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """An answer whose worth is known, and what each method thinks of it: more is more reliable."""

    right: bool
    scores: dict[str, float]


def measure(report: Report, data: Path, console: Console, *, model: str, cache_dir: Path, quick: bool) -> None:
    """Add precision and recall of finding wrong answers of the small model of routellm-gsm8k.

    References are five answers of the same model to other problems, reliable and unreliable, asked in both orders.
    """
    pairs = list(gsm8k(data).pairs)
    Random(7).shuffle(pairs)  # noqa: S311 - a reproducible sample
    targets, pool = pairs[: QUICK_TARGETS if quick else TARGETS], pairs[-200:]
    judge = ServedJudge(model, cache_dir)
    try:
        with Progress(console=console) as progress:
            task = progress.add_task("Meta Ranking: asking the judge", total=len(targets))
            judged = []
            for pair in targets:
                judged.append(_judged(judge, pair, pool))
                progress.advance(task)
    finally:
        judge.close()
    learnt, measured = _parted(judged)
    for method in ("covey", "self-confidence", "majority"):
        _add(report, method, learnt, measured)


def _parted(judged: Sequence[Target]) -> tuple[list[Target], list[Target]]:
    """Those that set thresholds and those that are measured, with the same share of right ones in both."""
    learnt: list[Target] = []
    measured: list[Target] = []
    for right in (True, False):
        kind = [target for target in judged if target.right is right]
        cut = round(len(kind) * LEARNT_ON)
        learnt += kind[:cut]
        measured += kind[cut:]
    return learnt, measured


def _judged(judge: ServedJudge, target: Pair, pool: Sequence[Pair]) -> Target:
    known = [(Reference(id=str(i), reliable=bool(pair.small)), _likeness(target, pair)) for i, pair in enumerate(pool)]
    comparisons = []
    for reference in choose_references(known):
        other = pool[int(reference.id)]
        comparisons.append(
            Comparison(
                reference=reference,
                first=judge.compare(target, other, tie=0.05),
                second=-judge.compare(other, target, tie=0.05),
            )
        )
    score = MetaRanking().judge(comparisons).score
    return Target(
        right=bool(target.small),
        scores={"covey": score, "self-confidence": judge.confidence(target), "majority": 0.0},
    )


def _likeness(left: Pair, right: Pair) -> float:
    """Shared words over all words: cheap, and nothing of the answer's worth is in it."""
    a, b = set(left.text.lower().split()), set(right.text.lower().split())
    return len(a & b) / max(1, len(a | b))


def _add(report: Report, method: str, learnt: Sequence[Target], measured: Sequence[Target]) -> None:
    if method == "majority":
        common = sum(target.right for target in learnt) * 2 >= len(learnt)
        says_wrong = np.array([not common for _ in measured])
    else:
        ranking = MetaRanking()
        theta = _threshold(ranking, [(target.scores[method], target.right) for target in learnt])
        says_wrong = np.array([target.scores[method] <= theta for target in measured])
    is_wrong = np.array([not target.right for target in measured])
    rng = np.random.default_rng(0)
    draws = [rng.integers(0, len(measured), len(measured)) for _ in range(RESAMPLES)]
    for metric in ("precision", "recall"):
        value = _share(metric, says_wrong, is_wrong)
        samples = [_share(metric, says_wrong[at], is_wrong[at]) for at in draws]
        low, high = np.percentile(samples, [2.5, 97.5])
        report.rows.append(
            Row(
                case="errors-routellm-gsm8k",
                system=method,
                metric=metric,
                unit="share",
                value=value,
                lo=float(low),
                hi=float(high),
                n=len(measured),
            )
        )


def _threshold(ranking: MetaRanking, scored: Sequence[tuple[float, bool]]) -> float:
    """The best threshold on scores of any size."""
    scale = max((abs(score) for score, _ in scored), default=1.0) or 1.0
    return ranking.learn([(score / scale, right) for score, right in scored]) * scale


def _share(metric: str, says_wrong: NDArray[np.bool_], is_wrong: NDArray[np.bool_]) -> float:
    """Of what a method calls wrong the share that is, or of what is wrong the share that it finds; 0 of nothing."""
    found = says_wrong & is_wrong
    whole = says_wrong if metric == "precision" else is_wrong
    return float(found.sum() / whole.sum()) if whole.any() else 0.0


def _short(pair: Pair) -> Pair:
    """As much of both texts as a small judge can read."""
    answer = pair.small_answer.split()
    return Pair(
        text=" ".join(pair.text.split()[:QUESTION_WORDS]),
        small_answer=" ".join(answer[-ANSWER_WORDS:]),
        large_answer="",
        small=pair.small,
        large=pair.large,
    )
