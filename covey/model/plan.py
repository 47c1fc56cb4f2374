"""What an engine asks of a runner in one step, and what comes back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleSpec:
    """How to draw the token that follows a row.

    `temperature` 0 is greedy (`top_p`, `top_k`, `min_p` and `seed` then play no part). `position` is the index, in the
    whole sequence, of the token to draw: with `seed` it keys the random number, so a draw is the same in any batch, on
    any worker. `history` is every token of the sequence so far, its first `prompt_len` being the prompt; it is needed
    only when a penalty is on: repetition looks at all of it, presence and frequency only at what was generated.
    `banned` ids are never drawn. `logprobs` asks for the log probability of the drawn token and of that many best
    ones, before any of these settings.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int = 0
    position: int = 0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    logprobs: int | None = None
    history: tuple[int, ...] = ()
    prompt_len: int = 0
    banned: tuple[int, ...] = ()

    @property
    def is_plain_greedy(self) -> bool:
        """Whether the answer is the arg max of the untouched logits and nothing more is asked for."""
        return (
            self.temperature == 0.0
            and self.logprobs is None
            and not self.banned
            and not self.logit_bias
            and not self.has_penalty
        )

    @property
    def has_penalty(self) -> bool:
        """Whether `history` matters."""
        return (self.presence_penalty, self.frequency_penalty, self.repetition_penalty) != (0.0, 0.0, 1.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """Consecutive new tokens of one sequence: one token when decoding, a chunk when prefilling.

    `start` is the position of the first of `tokens`; the keys and values of positions before it are in `blocks`, the
    block table, which covers `start + len(tokens)` positions. Without `sample` the row only fills the cache.
    """

    seq: int
    tokens: tuple[int, ...]
    start: int
    blocks: tuple[int, ...]
    sample: SampleSpec | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class StepPlan:
    """Rows computed together in one forward pass; a sequence has at most one row."""

    rows: tuple[Row, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampled:
    """The token drawn for a row; `logprob` and `top` only where the row asked for them."""

    seq: int
    token: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class StepOutcome:
    """The draws of a step, and the rows that failed alone: (sequence, what was wrong)."""

    sampled: tuple[Sampled, ...] = ()
    failed: tuple[tuple[int, str], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class RunnerInfo:
    """What a runner serves and how its blocks are laid out; `block_bytes` is one block over all layers, keys and
    values.
    """

    model: str
    revision: str
    tokenizer_hash: str
    block_size: int
    block_bytes: int
    n_blocks: int
    context_limit: int
    layout_fingerprint: str
    precision: str
    kv_dtype: str
    eos_ids: tuple[int, ...]
    n_layers: int
    vocab_size: int


class Runner(Protocol):
    """One model with its block pool. Not thread-safe: one thread calls `step`, and nobody touches the blocks of a
    running step.
    """

    @property
    def info(self) -> RunnerInfo:
        """The same for the runner's whole life."""

    def step(self, plan: StepPlan) -> StepOutcome:
        """Run the rows; a bad row is reported in `failed` and leaves the others as they are."""

    def block_view(self, block_id: int) -> memoryview:
        """The writable bytes of one block: [layers, 2 (K, V), kv_heads, block_size, head_dim] of `info.kv_dtype`."""

    def close(self) -> None:
        """Give the memory back; views handed out must be released first."""
