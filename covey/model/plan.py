"""What an engine asks of a runner in one step, and what comes back."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from covey.types.block import BlockShape, KvElement

_ELEMENTS = {"fp32": KvElement.FP32, "fp16": KvElement.FP16, "int8": KvElement.INT8}


Floats = NDArray[np.float32]


class TokenMask(Protocol):
    """Which tokens may be drawn, computed beside the forward pass."""

    def words(self) -> NDArray[np.int32]:
        """Wait for the mask: bit `i % 32` of word `i // 32` is set where token `i` is allowed; [ceil(vocab / 32)]."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleSpec:
    """How to draw the token that follows a row.

    `temperature` 0 is greedy (`top_p`, `top_k`, `min_p` and `seed` then play no part). `position` is the index, in the
    whole sequence, of the token to draw: with `seed` it keys the random number, so a draw is the same in any batch, on
    any worker. `history` is every token of the sequence so far, its first `prompt_len` being the prompt; it is needed
    only when a penalty is on: repetition looks at all of it, presence and frequency only at what was generated.
    `banned` ids are never drawn, nor is what `mask` leaves out. `logprobs` asks for the log probability of the drawn
    token and of that many best ones, before any of these settings.
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
    mask: TokenMask | None = None

    @property
    def is_plain_greedy(self) -> bool:
        """Whether the answer is the arg max of the untouched logits and nothing more is asked for."""
        return (
            self.temperature == 0.0
            and self.logprobs is None
            and not self.banned
            and self.mask is None
            and not self.logit_bias
            and not self.has_penalty
        )

    @property
    def has_penalty(self) -> bool:
        """Whether `history` matters."""
        return (self.presence_penalty, self.frequency_penalty, self.repetition_penalty) != (0.0, 0.0, 1.0)


class Elsewhere(Protocol):
    """Keys and values of a sequence's first tokens that are in other workers' memory."""

    @property
    def tokens(self) -> int:
        """How many: whole blocks, all before the row."""

    def attend(self, layer: int, q: Floats) -> Sequence[tuple[Floats, Floats]]:
        """Attend `q` [token, head, head_dim] to all of them: each shard's output of the same shape, and the log of the
        sum of its exponentials [token, head]. Blocks; called from the step's thread. Raises CoveyError.
        """


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """Consecutive new tokens of one sequence: one token when decoding, a chunk when prefilling.

    `start` is the position of the first of `tokens`; the keys and values of positions before it are in `blocks`, the
    block table, which covers `start + len(tokens)` positions. Without `sample` the row only fills the cache.

    The last `draft` tokens are guesses (a row with `sample` only): a token is drawn after the one before them and after
    each of them for as long as the guess equals the draw, so that the draws are those of `draft + 1` plain steps.

    A row may run through some layers only, `first_layer` up to, not including, `last_layer` (None: to the end). What it
    leaves unfinished waits in the runner until a row of the same sequence, start and tokens goes on from there, or
    `drop`. All such rows of a step share one range, and none has a draft.

    With `elsewhere` the block table begins after the tokens that are there; only a `ShardRunner` runs such a row.
    """

    seq: int
    tokens: tuple[int, ...]
    start: int
    blocks: tuple[int, ...]
    sample: SampleSpec | None = None
    draft: int = 0
    first_layer: int = 0
    last_layer: int | None = None
    elsewhere: Elsewhere | None = None

    @property
    def base(self) -> int:
        """The position that the block table begins with."""
        return self.elsewhere.tokens if self.elsewhere is not None else 0


@dataclass(frozen=True, slots=True, kw_only=True)
class StepPlan:
    """Rows computed together in one forward pass; a sequence has at most one row."""

    rows: tuple[Row, ...]


class Interrupt(Protocol):
    """Asked by the running step between two layers, from the step's own thread."""

    def cancelled(self) -> Collection[int]:
        """Sequences whose rows are wanted no more; only ever grows during a step."""

    def is_preempted(self) -> bool:
        """Whether rows of several tokens shall stop here, to go on in a later step."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Draw:
    """A drawn token; `logprob` and `top` only where the row asked for them."""

    token: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampled:
    """What was drawn for a row: one token, or with a draft the guesses that held and one more."""

    seq: int
    draws: tuple[Draw, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class StepOutcome:
    """The draws of a step; the rows that failed alone: (sequence, what was wrong); and the rows that stopped between
    layers: (sequence, layer to go on with). A row of a cancelled sequence is in none of them.
    """

    sampled: tuple[Sampled, ...] = ()
    failed: tuple[tuple[int, str], ...] = ()
    suspended: tuple[tuple[int, int], ...] = ()


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
    kv_heads: int = 0
    """Heads of keys and values in a block, and how wide they are; 0 when only the runner knows."""
    head_dim: int = 0

    @property
    def shape(self) -> BlockShape:
        """Its blocks, as the store and its codecs know them."""
        known = bool(self.kv_heads)
        return BlockShape(
            size_bytes=self.block_bytes,
            layers=self.n_layers,
            element=_ELEMENTS.get(self.kv_dtype, KvElement.OPAQUE) if known else KvElement.OPAQUE,
            kv_heads=self.kv_heads,
            head_dim=self.head_dim,
            tokens=self.block_size if known else 0,
        )


class Runner(Protocol):
    """One model with its block pool. Not thread-safe: one thread calls `step`, and nobody touches the blocks of a
    running step.
    """

    @property
    def info(self) -> RunnerInfo:
        """The same for the runner's whole life."""

    def step(self, plan: StepPlan, interrupt: Interrupt | None = None) -> StepOutcome:
        """Run the rows; a bad row is reported in `failed` and leaves the others as they are."""

    def drop(self, seq: int) -> None:
        """Forget what a sequence left between two layers; without effect when it left nothing."""

    def block_view(self, block_id: int) -> memoryview:
        """The writable bytes of one block, layer after layer; see `covey.model.pool` for what is in them."""

    def close(self) -> None:
        """Give the memory back; views handed out must be released first."""


@runtime_checkable
class ShardRunner(Protocol):
    """A runner that computes attention for others, over blocks that it keeps for them, and takes `Row.elsewhere`."""

    def attend(self, layer: int, blocks: tuple[int, ...], q: Floats) -> tuple[Floats, Floats]:
        """Attend `q` [token, head, head_dim] to all positions of full blocks: the output of the same shape, and the log
        of the sum of exponentials [token, head]. Any thread may call it, also during a step that does not write those
        blocks. Raises InvalidArgument (`layer`, `q`).
        """

    @property
    def query_shape(self) -> tuple[int, int]:
        """Heads and width of a token's queries."""
