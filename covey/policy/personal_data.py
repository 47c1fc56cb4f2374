"""Whether a text names somebody or something private: such texts are kept out of shared pools of examples."""

from __future__ import annotations

import re

_PATTERNS = {
    "an e-mail address": re.compile(r"[\w.+-]+@[\w-]+(\.[\w-]+)+"),
    "an IP address": re.compile(r"(?<![\d.])(?:\d{1,3}\.){3}\d{1,3}(?![\d.])"),
    "an account number": re.compile(r"(?<!\w)[A-Z]{2}\d{2}(?: ?[A-Z0-9]{4}){3,7}(?: ?[A-Z0-9]{1,3})?(?!\w)"),
    "a secret": re.compile(
        r"(?i)\b(?:api[_ -]?key|password|passwd|secret|token)\b\s*[:=]\s*\S+|-----BEGIN [A-Z ]*PRIVATE KEY-----"
    ),
    "a person": re.compile(r"(?<!\w)(?:Mr|Mrs|Ms|Miss|Dr|Prof|Herr|Frau)\.? [A-Z]\w+|(?i:\bmy name is) [A-Z]\w+"),
    "a social security number": re.compile(r"(?<!\d)\d{3}-\d{2}-\d{4}(?!\d)"),
}
_CARD = re.compile(r"(?<!\d)(?:\d[ -]?){12,18}\d(?!\d)")
_PHONE = re.compile(r"(?<![\w.])\+?\(?\d[\d ()/.-]{7,}\d(?![\w.])")
_PHONE_DIGITS = (9, 15)


def personal_data(text: str) -> str:
    """Say what of a person's a text holds; empty when nothing was found. Patterns find forms, not meaning."""
    for what, pattern in _PATTERNS.items():
        if pattern.search(text):
            return what
    if any(_is_card(match[0]) for match in _CARD.finditer(text)):
        return "a card number"
    if any(_is_phone(match[0]) for match in _PHONE.finditer(text)):
        return "a phone number"
    return ""


def _is_card(text: str) -> bool:
    """Luhn's check digit."""
    digits = [int(c) for c in text if c.isdigit()]
    doubled = [d if i % 2 == 0 else (2 * d - 9 if d > 4 else 2 * d) for i, d in enumerate(reversed(digits))]
    return 13 <= len(digits) <= 19 and sum(doubled) % 10 == 0


def _is_phone(text: str) -> bool:
    low, high = _PHONE_DIGITS
    digits = sum(c.isdigit() for c in text)
    return low <= digits <= high and (text.startswith(("+", "(", "0")) or "-" in text or " " in text)
