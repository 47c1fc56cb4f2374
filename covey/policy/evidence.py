"""What speaks for a stored answer: cheap features of two texts and of the neighbourhood, each higher when safer."""

from __future__ import annotations

import math
import unicodedata
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from covey.policy.reuse_guard import FUNCTION_WORDS, negations, numbers, opposite, quoted, reordered, words

FEATURES = (
    "similarity",
    "margin",
    "agreement",
    "support",
    "shared words",
    "rare words",
    "letters",
    "numbers",
    "quoted strings",
    "negation",
    "opposites",
    "order of arguments",
    "length",
    "same words",
    "function words",
)
"""The names of the features, in order; each is larger the safer the hit looks."""

BUCKETS = 1 << 14
NEIGHBOURS = 8
"""How many neighbours vote."""
MARGIN_MAX = 0.3
KERNEL = 20.0
"""How fast a neighbour's weight falls with its distance from the nearest one: to 1/e at 0.05."""
_SUFFIXES = ("ing", "ed", "es", "s")


class Rarity:
    """How rare words are in a category, counted in hashed buckets: bounded, and no word can be read back from it."""

    def __init__(self, texts: int = 0, counts: Mapping[int, int] | None = None) -> None:
        self._texts = texts
        self._counts = dict(counts or {})
        if any(not 0 <= bucket < BUCKETS or count < 0 for bucket, count in self._counts.items()):
            raise ValueError(f"buckets lie in [0, {BUCKETS}) and counts are not negative")

    @property
    def texts(self) -> int:
        """How many texts were counted."""
        return self._texts

    @property
    def counts(self) -> dict[int, int]:
        """Texts by bucket of their words."""
        return dict(self._counts)

    def add(self, stems: Iterable[str]) -> None:
        """Count the distinct stems of one text."""
        self._texts += 1
        for bucket in {_bucket(stem) for stem in stems}:
            self._counts[bucket] = self._counts.get(bucket, 0) + 1

    def __call__(self, stem: str) -> float:
        """About 1 for a word never seen, near 0 for one in every text."""
        seen = self._counts.get(_bucket(stem), 0)
        return math.log((self._texts + 2) / (seen + 0.5)) / math.log(2 * self._texts + 4)


@dataclass(frozen=True, slots=True)
class Parsed:
    """A text taken apart once for all comparisons."""

    words: tuple[str, ...]
    stems: frozenset[str]
    function_words: frozenset[str]
    letters: frozenset[str]
    numbers: tuple[str, ...]
    quoted: tuple[str, ...]
    negations: int


def parse(text: str) -> Parsed:
    """Take a text apart."""
    text = unicodedata.normalize("NFKC", text)
    found = words(text)
    joined = " ".join(found)
    return Parsed(
        words=found,
        stems=frozenset(stem(word) for word in found if word not in FUNCTION_WORDS),
        function_words=frozenset(word for word in found if word in FUNCTION_WORDS),
        letters=frozenset(joined[at : at + 3] for at in range(len(joined) - 2)),
        numbers=numbers(text),
        quoted=quoted(text),
        negations=negations(found),
    )


def stem(word: str) -> str:
    """Cut common English endings off, so that forms of a word compare equal; crude, and meant to be."""
    if len(word) > 4 and word.endswith("ies"):
        return word[:-3] + "y"
    for suffix in _SUFFIXES:
        if word.endswith(suffix) and len(word) - len(suffix) >= 3 and not word.endswith("ss"):
            word = word[: -len(suffix)]
            break
    return word[:-1] if len(word) > 4 and word.endswith("e") else word


def evidence(
    asked: Parsed, stored: Parsed, similarities: Sequence[float], agrees: Sequence[bool], rarity: Rarity
) -> tuple[float, ...]:
    """Return the features of serving `stored` for `asked`.

    `similarities` are those of the nearest entries by falling similarity, the candidate's first; `agrees` says which
    of them hold the candidate's answer (the first does).
    """
    nearest = similarities[0]
    weights = [math.exp(KERNEL * (min(similarity, nearest) - nearest)) for similarity in similarities]
    support = sum(weight for weight, agreeing in zip(weights, agrees, strict=True) if agreeing)
    rival = next((s for s, agreeing in zip(similarities, agrees, strict=True) if not agreeing), None)
    shared = sum(map(rarity, asked.stems & stored.stems))
    alone = [rarity(word) for word in asked.stems ^ stored.stems]
    total = shared + sum(alone)
    return (
        min(6.0, -math.log(max(1e-6, 1.0025 - nearest))),
        min(MARGIN_MAX, nearest - rival) if rival is not None else _unrivalled(similarities),
        support / sum(weights),
        math.log1p(support),
        shared / total if total else 1.0,
        -max(alone, default=0.0),
        _overlap(asked.letters, stored.letters),
        float(asked.numbers == stored.numbers),
        float(asked.quoted == stored.quoted),
        float(asked.negations == stored.negations),
        float(opposite(asked.words, stored.words) is None),
        float(not reordered(asked.words, stored.words)),
        -abs(math.log((len(asked.words) + 1) / (len(stored.words) + 1))),
        float(asked.words == stored.words),
        _overlap(asked.function_words, stored.function_words),
    )


def _unrivalled(similarities: Sequence[float]) -> float:
    """The margin when all agree: a rival can be no nearer than the last of them, unless these are all there are."""
    if len(similarities) < NEIGHBOURS:
        return MARGIN_MAX
    return min(MARGIN_MAX, similarities[0] - similarities[-1] + 0.05)


def _overlap(left: frozenset[str], right: frozenset[str]) -> float:
    either = len(left | right)
    return len(left & right) / either if either else 1.0


def _bucket(stem_: str) -> int:
    return zlib.crc32(stem_.encode()) % BUCKETS
