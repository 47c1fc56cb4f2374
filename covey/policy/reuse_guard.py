"""The lexical guard of semantic reuse: what an embedding overlooks and an answer depends on must agree."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence


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
_FUNCTION_WORDS = frozenset(
    _split(
        "a an the is are was were be been do does did can could will would shall should may might must have has had "
        "i you he she it we they me my your his her its our their this that these those what which who whom whose when "
        "where why how of in on at by for with about as and or if then there so to please tell"
    )
)


def disagreement(left: str, right: str) -> str:
    """Say in what two texts disagree; empty when in nothing. Which text is the left one makes no difference.

    Compared are numbers, quoted strings, negations and opposites, and the order of arguments. Words are English
    ones; in other languages only numbers, quotes and a mere reordering of the same words are seen. A guard errs
    towards a miss: it costs a hit where a paraphrase reorders what it names.
    """
    left, right = unicodedata.normalize("NFKC", left), unicodedata.normalize("NFKC", right)
    if left == right:
        return ""
    if _numbers(left) != _numbers(right):
        return "numbers differ"
    if _quoted(left) != _quoted(right):
        return "quoted strings differ"
    words_left, words_right = _words(left), _words(right)
    if _negations(words_left) != _negations(words_right):
        return "one negates what the other does not"
    if opposite := _opposite(words_left, words_right):
        return f"one says {opposite[0]}, the other {opposite[1]}"
    if _reordered(words_left, words_right):
        return "the order of arguments differs"
    return ""


def _numbers(text: str) -> tuple[str, ...]:
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


def _quoted(text: str) -> tuple[str, ...]:
    return tuple(next((group for group in match.groups() if group), "").strip() for match in _QUOTED.finditer(text))


def _words(text: str) -> tuple[str, ...]:
    return tuple(match[0].lower().replace("’", "'") for match in _WORD.finditer(text))


def _negations(words: Sequence[str]) -> int:
    return sum(word in _NEGATIONS or word.endswith("n't") for word in words)


def _opposite(left: Sequence[str], right: Sequence[str]) -> tuple[str, str] | None:
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


def _reordered(left: Sequence[str], right: Sequence[str]) -> bool:
    """Whether shared words stand in another order where the order carries the meaning."""
    content_left = [_stem(word) for word in left if word not in _FUNCTION_WORDS]
    content_right = [_stem(word) for word in right if word not in _FUNCTION_WORDS]
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


def _pairs(words: Sequence[str]) -> set[tuple[str, str]]:
    """Return the nearest content words on both sides of each `to`."""
    pairs: set[tuple[str, str]] = set()
    for index, word in enumerate(words):
        if word == "to":
            before = next((_stem(w) for w in reversed(words[:index]) if w not in _FUNCTION_WORDS), None)
            after = next((_stem(w) for w in words[index + 1 :] if w not in _FUNCTION_WORDS), None)
            if before is not None and after is not None:
                pairs.add((before, after))
    return pairs


def _stem(word: str) -> str:
    return word[:-1] if len(word) > 3 and word.endswith("s") and not word.endswith("ss") else word
