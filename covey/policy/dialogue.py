"""Last turns that lean on what was said before: found by their words, and spelt out by terms of earlier turns.

A cached answer may serve a turn only with all that the turn refers to. A turn that stands alone is looked up as it is;
one that leans on earlier user turns gets their content words in front; one that refers to something that only an
answer can have said ("the second one", "explain your code") cannot be spelt out, and keeps its whole history as key.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

TERMS_MAX = 6
TURNS_BACK = 6
CONTENT_MIN = 2

_WORD = re.compile(r"[^\W_]+(?:['’-][^\W_]+)*")


def _split(words: str) -> frozenset[str]:
    return frozenset(words.split())


PRONOUNS = _split(
    "it its itself they them their theirs themselves this that these those he him his himself she her hers herself "
    "one ones such same former latter there here it's that's they're he's she's both neither either"
)
_POSSESSIVE = _split("its their theirs his her hers")
_REPLACED = _split("it they them he him she these those") | _POSSESSIVE
_POINTERS = _split(
    "other others another else more also too instead again different similar first second third last next"
)
_ANSWERS = _split("you your yours above previous earlier below aforementioned said mentioned answer reply response")
_JOINTS = _split("and but so or then")
FUNCTION_WORDS = PRONOUNS | _split(
    "a an the is are was were be been being am do does did done doing have has had having can could will would "
    "shall should may might must i me my mine we us our of in on at by for with about as to from into onto over "
    "under between and or but if than then so not no nor what what's which who who's whom whose when where why how "
    "your please tell show give explain describe let say said know want like just get got go going make makes made "
    "some any all many much very really also too more most other others another own only even still ever now yes ok "
    "okay oh well thanks thank interesting wow great mean find you think talk information info something anything "
    "everything thing things kind sort lot used use"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Spelt:
    """A turn as it is looked up. `leans`: it needs earlier turns; `resolved`: `text` holds what it needs."""

    text: str
    leans: bool
    resolved: bool


def leans(text: str) -> bool:
    """Whether a turn means something only together with earlier ones. Errs towards yes."""
    words = _words(text)
    if not words:
        return False
    if PRONOUNS & set(words) or _refers_to_answer(words):
        return True
    content = _content(words)
    if len(content) < CONTENT_MIN:
        return True
    if words[:2] in (["what", "about"], ["how", "about"], ["any", "other"], ["what", "else"]):
        return True
    return words[0] in ("and", "but", "so", "or", "then") or bool(
        _POINTERS & set(words) and len(content) <= CONTENT_MIN
    )


def spell_out(text: str, turns: Sequence[str]) -> Spelt:
    """Put the terms of earlier turns in front of a turn that leans on them; another one is returned as it is."""
    if not turns or not leans(text):
        return Spelt(text=text, leans=False, resolved=True)
    if _refers_to_answer(_words(text)):
        return Spelt(text=text, leans=True, resolved=False)
    own = set(_content(_words(text)))
    terms = [term for term in _terms(turns) if term not in own]
    if not terms:
        return Spelt(text=text, leans=True, resolved=False)
    return Spelt(text=_put(" ".join(terms), text), leans=True, resolved=True)


def _put(terms: str, text: str) -> str:
    """The terms in the place of the first pronoun, or behind a turn that has none."""
    for match in _WORD.finditer(text):
        word = match[0].lower().replace("’", "'")
        if word in _REPLACED:
            suffix = "'s" if word in _POSSESSIVE else ""
            return f"{text[: match.start()]}{terms}{suffix}{text[match.end() :]}"
    return f"{text.rstrip(' .?!')} {terms}"


def _terms(turns: Sequence[str]) -> list[str]:
    """Content words of the nearest turn that stands alone, then those of the turns after it, oldest first."""
    recent = list(turns)[-TURNS_BACK:]
    start = next((index for index in reversed(range(len(recent))) if not leans(recent[index])), 0)
    found: dict[str, None] = {}
    for turn in recent[start:]:
        found |= dict.fromkeys(_content(_words(turn)))
    return list(found)[:TERMS_MAX]


def _refers_to_answer(words: Sequence[str]) -> bool:
    return bool(_ANSWERS & set(words))


def _words(text: str) -> list[str]:
    return [match[0].lower().replace("’", "'") for match in _WORD.finditer(text)]


def _content(words: Sequence[str]) -> list[str]:
    return [word for word in words if word not in FUNCTION_WORDS]
