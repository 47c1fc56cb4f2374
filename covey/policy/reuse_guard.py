"""The lexical guard of semantic reuse: what an embedding overlooks and an answer depends on must agree."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from enum import StrEnum


def _split(words: str) -> list[str]:
    return words.split()


_NUMBER = re.compile(r"(?<!\w)-\d+(?:[.,:/]\d+)*|\d+(?:[.,:/]\d+)*")
_THOUSANDS = re.compile(r"-?\d{1,3}(,\d{3})+(\.\d+)?")
_NUMBER_WORDS = {
    word: str(value)
    for value, word in enumerate(
        _split(
            "two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
            "eighteen nineteen twenty"
        ),
        start=2,
    )
} | {"thirty": "30", "forty": "40", "fifty": "50", "sixty": "60", "hundred": "100", "thousand": "1000"}
_QUOTED = re.compile(r"\"([^\"]*)\"|“([^”]*)”|«([^»]*)»|`([^`]*)`|(?<!\w)'([^']*)'(?!\w)|‘([^’]*)’")
_WORD = re.compile(r"[^\W_]+(?:['’][^\W_]+)*")
_EDGES = "\"'`“”‘’«»,;:!?()[]{}"
_PATH = re.compile(r"[/\\*$_~@#=|<>]|^--?[A-Za-z]|^\.\w|\w\.[A-Za-z]{1,5}$|[a-z][A-Z]|\w\(\)")
_NEGATIONS = frozenset(_split("not no never none nor neither nothing nobody nowhere without cannot hardly barely"))
_OPPOSITES = tuple(
    pair.split("/")
    for pair in _split(
        "ascending/descending enable/disable enabled/disabled increase/decrease include/exclude open/close add/remove "
        "allow/deny first/last minimum/maximum min/max buy/sell start/stop lock/unlock install/uninstall before/after "
        "accept/reject encrypt/decrypt encode/decode import/export upload/download login/logout largest/smallest "
        "highest/lowest most/least more/less above/below show/hide win/lose pass/fail true/false on/off up/down "
        "activate/deactivate subscribe/unsubscribe mount/unmount push/pull best/worst legal/illegal safe/unsafe"
    )
)
_DIRECTIONAL = frozenset(_split("than from into versus vs before after over under instead"))
FUNCTION_WORDS = frozenset(
    _split(
        "a an the is are was were be been do does did can could will would shall should may might must have has had "
        "i you he she it we they me my your his her its our their this that these those what which who whom whose when "
        "where why how of in on at by for with about as and or if then there so to please tell"
    )
)


class Check(StrEnum):
    """What a guard compares. PATHS are paths, globs, flags and identifiers: what is not a plain word."""

    NUMBERS = "numbers"
    QUOTED = "quoted"
    PATHS = "paths"
    NEGATION = "negation"
    OPPOSITES = "opposites"
    ORDER = "order"


ALL_CHECKS = frozenset(Check)


def disagreement(left: str, right: str, checks: frozenset[Check] = ALL_CHECKS) -> str:
    """Say in what two texts disagree; empty when in nothing. Which text is the left one makes no difference.

    Compared are numbers, quoted strings, paths and identifiers, negations and opposites, and the order of arguments,
    as far as they are among the `checks`. Words are English ones; in other languages only numbers, quotes, paths and a
    mere reordering of the same words are seen. A guard errs towards a miss: it costs a hit where a paraphrase reorders
    what it names.
    """
    left, right = unicodedata.normalize("NFKC", left), unicodedata.normalize("NFKC", right)
    if left == right:
        return ""
    if Check.NUMBERS in checks and numbers(left) != numbers(right):
        return "numbers differ"
    if Check.QUOTED in checks and quoted(left) != quoted(right):
        return "quoted strings differ"
    if Check.PATHS in checks and paths(left) != paths(right):
        return "paths or identifiers differ"
    words_left, words_right = words(left), words(right)
    if Check.NEGATION in checks and negations(words_left) != negations(words_right):
        return "one negates what the other does not"
    if Check.OPPOSITES in checks and (found := opposite(words_left, words_right)):
        return f"one says {found[0]}, the other {found[1]}"
    if Check.ORDER in checks and reordered(words_left, words_right):
        return "the order of arguments differs"
    return ""


def paths(text: str) -> frozenset[str]:
    """Paths, globs, flags and identifiers: `/etc/x`, `*.txt`, `--all`, `snake_case`, `camelCase`, `f()`."""
    return frozenset(token for found in text.split() if (token := found.strip(_EDGES)) and _PATH.search(token))


def numbers(text: str) -> tuple[str, ...]:
    """Numbers in order, written in digits whatever they were."""
    digits = [(match.start(), match[0]) for match in _NUMBER.finditer(text.replace("−", "-"))]
    spelt = [
        (match.start(), _NUMBER_WORDS[match[0].lower()])
        for match in _WORD.finditer(text)
        if match[0].lower() in _NUMBER_WORDS
    ]
    return tuple(_canonical(number) for _, number in sorted(digits + spelt))


def _canonical(number: str) -> str:
    """Make 1,000 and 1000 one number; else numbers stay as written: 3.1 and 3.10 are two versions."""
    return number.replace(",", "") if _THOUSANDS.fullmatch(number) else number


def quoted(text: str) -> tuple[str, ...]:
    """Quoted strings in order."""
    return tuple(next((group for group in match.groups() if group), "").strip() for match in _QUOTED.finditer(text))


def words(text: str) -> tuple[str, ...]:
    """Words in order, in lower case."""
    return tuple(match[0].lower().replace("’", "'") for match in _WORD.finditer(text))


def negations(said: Sequence[str]) -> int:
    """How many words negate."""
    return sum(word in _NEGATIONS or word.endswith("n't") for word in said)


def opposite(left: Sequence[str], right: Sequence[str]) -> tuple[str, str] | None:
    """Find a pair of which each text says only one, and not the same one."""
    has_left, has_right = set(left), set(right)
    for one, other in _OPPOSITES:
        says_left = (one in has_left, other in has_left)
        says_right = (one in has_right, other in has_right)
        if says_left == (True, False) and says_right == (False, True):
            return one, other
        if says_left == (False, True) and says_right == (True, False):
            return other, one
    return None


def reordered(left: Sequence[str], right: Sequence[str]) -> bool:
    """Whether shared words stand in another order where the order carries the meaning."""
    content_left = [_stem(word) for word in left if word not in FUNCTION_WORDS]
    content_right = [_stem(word) for word in right if word not in FUNCTION_WORDS]
    common = set(content_left) & set(content_right)
    order_left = [word for word in content_left if word in common]
    order_right = [word for word in content_right if word in common]
    if order_left == order_right:
        return False
    if sorted(content_left) == sorted(content_right):
        return True
    if _DIRECTIONAL & (set(left) | set(right)):
        return True
    return any((after, before) in _pairs(right) for before, after in _pairs(left))


def _pairs(said: Sequence[str]) -> set[tuple[str, str]]:
    """Return the nearest content words on both sides of each `to`."""
    pairs: set[tuple[str, str]] = set()
    for index, word in enumerate(said):
        if word == "to":
            before = next((_stem(w) for w in reversed(said[:index]) if w not in FUNCTION_WORDS), None)
            after = next((_stem(w) for w in said[index + 1 :] if w not in FUNCTION_WORDS), None)
            if before is not None and after is not None:
                pairs.add((before, after))
    return pairs


def _stem(word: str) -> str:
    return word[:-1] if len(word) > 3 and word.endswith("s") and not word.endswith("ss") else word
