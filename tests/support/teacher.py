"""Teacher forcing: promise 9, checked token by token against transformers on the same weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

TIE = 1e-3
"""A token within this of the reference's best logit counts as equal (promise 9)."""


@dataclass(slots=True)
class Tally:
    """Tokens that were the reference's argmax, that tied with it, and that were neither."""

    matched: int = 0
    ties: int = 0
    wrong: int = 0

    def __str__(self) -> str:
        return f"{self.matched} tokens matched, {self.ties} ties, {self.wrong} wrong"


class Teacher:
    """The reference model, remembering what it has judged already."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._judged: dict[tuple[tuple[int, ...], tuple[int, ...]], Tally] = {}

    def judge(self, prompt: Sequence[int], answer: Sequence[int]) -> Tally:
        """Compare each token of a greedy answer with the reference's choice after the same prefix."""
        key = (tuple(prompt), tuple(answer))
        if key not in self._judged:
            self._judged[key] = self._forward(*key)
        return self._judged[key]

    def _forward(self, prompt: tuple[int, ...], answer: tuple[int, ...]) -> Tally:
        with torch.inference_mode():
            logits = self._model(torch.tensor([prompt + answer[:-1]])).logits[0, len(prompt) - 1 :]
        best = logits.max(dim=-1).values
        chosen = logits[torch.arange(len(answer)), torch.tensor(answer)]
        gap = best - chosen
        ties = int(((gap > 0) & (gap <= TIE)).sum())
        wrong = int((gap > TIE).sum())
        return Tally(matched=len(answer) - ties - wrong, ties=ties, wrong=wrong)
