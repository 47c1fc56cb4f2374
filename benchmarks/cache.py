"""`covey bench cache`: the same questions with the same vectors through semcache, its peers and their rules."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from hashlib import blake2b
from pathlib import Path
from tempfile import TemporaryDirectory

import anyio
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks import cache_ours, cache_peers, cache_rules
from benchmarks.cache_figures import RULES, Figures, System
from benchmarks.cache_ours import Played
from benchmarks.cache_plots import cache_plot
from benchmarks.cache_rules import DELTAS, TAUS, Best, Stream, best_setting, play_entry_bound, play_threshold
from benchmarks.cache_sets import Question, QuestionSet, load, texts_of
from benchmarks.cache_vectors import VectorFile
from benchmarks.report import Report
from covey.clock import MonotonicClock
from covey.errors import CoveyError
from covey.policy.reuse_learning import Learnt
from covey.testing import VirtualClock
from services.semcache.minilm import PACKAGED, find_model

QUICK_QUESTIONS = 2500
EXAMPLES = 32
DIALOGUES = "cast"
DEFAULTS = {"gptcache": 0.6, "redisvl": 0.9}
"""The cosine similarity at which each serves if nobody sets it otherwise."""
ANSWER_LIFE, TTL = 2000, 500
"""In the part on staleness each answer changes once in so many questions, and entries live for so many."""

FORMATION = """\
A stream is the measuring half of a set, asked one question after the other; an answer that a system does not serve
from its cache comes from the model (here: the labelled answer) and is offered to the cache, which starts empty. A hit
is right when the served answer is that of an equal question. Ours learns each category's decision on the other half;
uniform, GPTCache, RedisVL and vCache's rule get the one setting that is best in hindsight on the measured half, of all
sets together, with at most 1 false hit per 100 questions, and the better of two keys for dialogues (last message, all
user turns joined)."""


def run(data: Path, console: Console, *, quick: bool, with_peers: bool, plots: Path) -> Report:
    """Measure everything in turn; a peer that fails is left out, and the reason printed. Raises `NotFound`."""
    sets = load(data)
    sets = [one.head(QUICK_QUESTIONS) for one in sets] if quick else sets
    console.print(FORMATION, style="dim", markup=False)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress, TemporaryDirectory(prefix="covey-") as place:
        bench = CacheBench(sets, plots, progress)
        bench.encode()
        bench.learn()
        bench.ours(classified=not quick)
        bench.rules()
        if with_peers:
            bench.peers(Path(place), console)
        bench.ageing()
    report = Report("cache")
    bench.figures.write(report)
    console.print("\n".join(bench.figures.notes), markup=False)
    cache_plot(plots / "cache.png", bench.figures, bench.curves())
    return report


class CacheBench:
    """The steps of one run, in order."""

    def __init__(self, sets: Sequence[QuestionSet], folder: Path, progress: Progress) -> None:
        self._sets = sets
        self._progress = progress
        self._vectors = VectorFile(folder, find_model(PACKAGED), threads=2, batch_max=32)
        self._learnt: dict[str, Learnt] = {}
        self._streams: dict[str, list[Stream]] = {}
        self._uniform: Best | None = None
        self.figures = Figures({one.name: len(one.measure) for one in sets}, DIALOGUES)

    def encode(self) -> None:
        """Have a vector of every key."""
        texts = texts_of(self._sets)
        for one in self._sets:
            texts += cache_ours.keys_of(one.learn) + cache_ours.keys_of(one.measure) + _joined(one.measure)
        self._vectors.fill(texts, self._progress)

    def learn(self) -> None:
        """Learn every category's decision on the learning halves."""
        task = self._progress.add_task("learning", total=len(self._sets))
        for one in self._sets:
            self._learnt[one.name] = learnt = cache_ours.learn(one.learn, self._vectors.vector)
            self.figures.learnt(one.name, learnt)
            self._progress.advance(task)

    def ours(self, *, classified: bool) -> None:
        """Play every stream through semcache, with named categories and then, if wanted, with classified ones."""
        task = self._progress.add_task("semcache", total=len(self._sets) * (2 if classified else 1))
        policies = cache_ours.policies(self._learnt)
        examples = {one.name: [question.text for question in one.learn[:EXAMPLES]] for one in self._sets}
        for is_classified in (False, True)[: 2 if classified else 1]:
            played: dict[str, Played] = {}
            for one in self._sets:
                play = partial(
                    cache_ours.play, one.name, one.measure, policies, self._vectors.vector,
                    dim=self._vectors.dim, examples=examples if is_classified else None,
                )  # fmt: skip
                played[one.name] = anyio.run(play)
                self._progress.advance(task)
            system = System.CLASSIFIED if is_classified else System.COVEY
            self.figures.add(system, played)

    def rules(self) -> None:
        """Find the best settings of one threshold for all, and of vCache's rule."""
        for one in self._sets:
            last = self._stream(one, [question.text for question in one.measure])
            joined = self._stream(one, _joined(one.measure)) if one.name == DIALOGUES else last
            self._streams.setdefault("last message", []).append(last)
            self._streams.setdefault("joined turns", []).append(joined)
        task = self._progress.add_task("one threshold for all", total=None)
        search = partial(best_setting, progress=lambda: self._progress.advance(task))
        best = self._uniform = search(self._streams, TAUS, play_threshold)
        self._note(System.UNIFORM, best)
        single = {"": [stream for stream in self._streams["last message"] if stream.name != DIALOGUES]}
        alone = search(single, TAUS, play_threshold)
        self.figures.single_turn(alone)
        vcache = search(self._streams, DELTAS, play_entry_bound)
        self._note(System.VCACHE, vcache)
        for stream in self._streams["last message"]:
            if stream.name == DIALOGUES:
                for name, tau in DEFAULTS.items():
                    self.figures.last_message(f"last-message-at-{name}-default", play_threshold(stream, tau))

    def peers(self, folder: Path, console: Console) -> None:
        """Play every stream through the real packages, at the threshold that is best for them."""
        missing = cache_peers.missing()
        best = self._uniform
        assert best is not None
        task = self._progress.add_task("peers", total=len(cache_peers.DRIVERS))
        for system in (System.GPTCACHE, System.REDISVL):
            if system not in missing and not math.isnan(best.setting):
                try:
                    streams = self._streams[best.key]
                    tau, played = cache_peers.play_peer(system, streams, best.setting, folder, MonotonicClock())
                    self.figures.note(f"{system}: the real package at cosine {tau:g}, key of dialogues: {best.key}")
                    self.figures.add(system, played)
                except CoveyError as error:
                    missing[system] = cache_peers.reason(error)
            if system in missing:
                console.print(f"{system} is left out, its rule stands for it: {missing[system]}", markup=False)
                self.figures.add(RULES[system], {n: Played(outcomes=o) for n, o in best.outcomes.items()})
            self._progress.advance(task)

    def ageing(self) -> None:
        """The same streams with answers that change: an absolute age limit, one that hits renew, and none."""
        best = self._uniform
        assert best is not None
        task = self._progress.add_task("stale hits", total=len(self._sets))
        tau = best.setting if not math.isnan(best.setting) else 1.0
        for one, stream in zip(self._sets, self._streams.get(best.key, self._streams["last message"]), strict=True):
            versions = [_version(question, index) for index, question in enumerate(one.measure)]
            policies = cache_ours.policies(self._learnt, ttl_s=float(TTL))
            clock = VirtualClock()
            play = partial(
                cache_ours.play, one.name, one.measure, policies, self._vectors.vector,
                dim=self._vectors.dim, clock=clock, versions=versions,
            )  # fmt: skip
            ours = anyio.run(play)
            self.figures.stale("covey", one.name, ours.outcomes, ours.stale)
            for system, ttl, slides in (("redisvl-rule", float(TTL), True), ("gptcache-rule", math.inf, False)):
                outcomes, stale = cache_rules.play_ageing(stream, tau, versions, ttl=ttl, slides=slides)
                self.figures.stale(system, one.name, outcomes, stale)
            self._progress.advance(task)

    def curves(self) -> dict[str, list[tuple[float, float]]]:
        """False and right hits per 100 of one threshold, from strict to loose, by set."""
        found: dict[str, list[tuple[float, float]]] = {}
        for stream in self._streams["last message"]:
            for tau in TAUS[::4]:
                outcomes = play_threshold(stream, tau)
                share = (100.0 * float((outcomes == 2).mean()), 100.0 * float((outcomes == 1).mean()))
                found.setdefault(stream.name, []).append(share)
        return found

    def _stream(self, one: QuestionSet, keys: Sequence[str]) -> Stream:
        return Stream(one.name, one.measure, keys, self._vectors.vector)

    def _note(self, system: System, best: Best) -> None:
        self.figures.note(f"{system}: setting {best.setting:g}, key of dialogues: {best.key}")
        self.figures.add(system, {name: Played(outcomes=outcomes) for name, outcomes in best.outcomes.items()})


def _joined(questions: Sequence[Question]) -> list[str]:
    return ["\n".join((*question.turns, question.text)) for question in questions]


def _version(question: Question, index: int) -> int:
    """How often the right answer has changed until now: once in `ANSWER_LIFE` questions, each at its own time."""
    phase = int.from_bytes(blake2b(str(question.answer).encode(), digest_size=4).digest()) % ANSWER_LIFE
    return (index + phase) // ANSWER_LIFE
