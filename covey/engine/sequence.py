"""One request inside the engine: its tokens, blocks and clock."""

from __future__ import annotations

from collections.abc import Sequence as Items
from dataclasses import dataclass, field

from anyio import CancelScope

from covey.errors import CoveyError
from covey.model.grammar import GrammarState
from covey.model.plan import Draw, Elsewhere, SampleSpec
from covey.types.generate import GenerateRequest, Stage, Timings, TokenLogprob, Tokens, TopLogprob, Usage

from .chain import BlockChain
from .loan import Borrowed
from .outbox import Outbox
from .text import TextPipe, Vocabulary


@dataclass(slots=True, kw_only=True, eq=False)
class Sequence:
    """The actor's state of one request. `tokens` are the prompt and all that was generated, here or elsewhere."""

    id: int
    request: GenerateRequest
    outbox: Outbox
    chain: BlockChain
    text: TextPipe
    tokens: list[int]
    tokens_max: int
    """The sequence ends when it has this many tokens."""
    blocks_needed: int
    """Blocks that it may come to hold."""
    deadline: float
    submitted_at: float
    eos_ids: tuple[int, ...]
    handed_over: int = 0
    """Tokens whose blocks a ticket names: 0 without one."""
    grammar: GrammarState | None = None
    """Where the answer is in its grammar, if it has one."""
    failure: CoveyError | None = None
    """Why the answer cannot go on."""

    blocks: list[int] = field(default_factory=list)
    promised: int = 0
    """Reserved blocks, not taken yet."""
    named: int = 0
    """Leading blocks that are in the prefix cache under their name."""
    stored: int = 0
    """Leading blocks that are known to be in the store."""
    computed: int = 0
    """Leading tokens whose keys and values are in the blocks."""
    transfer: CancelScope | None = None
    """The task that loads or stores this sequence's blocks; they stay held until it ends."""
    is_long: bool = False
    """Whether its oldest blocks go to other workers: `blocks_needed` is then a window, and no block has a name."""
    elsewhere: Elsewhere | None = None
    """The tokens that are with other workers, all before those of `blocks`."""
    borrowed: list[Borrowed] = field(default_factory=list)
    """The loans that keep them."""
    is_running: bool = False
    """Whether the batcher may plan it; not while it waits, loads, is handed over or swapped out."""
    is_loading: bool = False
    """Whether it runs through the first layers while its blocks' other layers are still on their way."""
    brought: int = 0
    """Leading tokens that were there when loading ended."""
    is_suspended: bool = False
    """Whether the runner keeps something of it between two layers."""
    is_over: bool = False
    paused_at: float | None = None
    preemptions: int = 0

    admitted_at: float = 0.0
    started_at: float = 0.0
    first_token_at: float = 0.0
    lookup_s: float = 0.0
    transfer_s: float = 0.0
    kv_wait_s: float = 0.0
    waits_since: float | None = None
    """Since when it cannot go on for want of loaded keys and values."""
    cached_tokens: int = 0
    loaded_tokens: int = 0
    blocks_moved: int = 0

    @property
    def prompt_len(self) -> int:
        """Tokens of the prompt."""
        return len(self.request.token_ids)

    @property
    def generated(self) -> int:
        """Tokens generated so far, by any worker."""
        return len(self.tokens) - self.prompt_len

    @property
    def has_ended(self) -> bool:
        """Whether the tokens so far already are a whole answer."""
        is_cut = len(self.tokens) >= self.tokens_max or self.failure is not None
        return self.text.is_stopped or is_cut or self.met_eos or self._is_complete

    @property
    def is_stop(self) -> bool:
        """Whether the answer ended by itself, not by its length."""
        return self.text.is_stopped or self.met_eos or self._is_complete

    @property
    def _is_complete(self) -> bool:
        return self.grammar is not None and self.grammar.is_over

    @property
    def met_eos(self) -> bool:
        """Whether the last token ends the text."""
        sampling = self.request.sampling
        return self.generated > 0 and not sampling.ignore_eos and self.tokens[-1] in self.eos_ids

    def sample_spec(self) -> SampleSpec:
        """How to draw the token after the last one."""
        sampling = self.request.sampling
        may_end = self.generated >= sampling.min_tokens
        return SampleSpec(
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            min_p=sampling.min_p,
            seed=sampling.seed,
            position=len(self.tokens),
            presence_penalty=sampling.presence_penalty,
            frequency_penalty=sampling.frequency_penalty,
            repetition_penalty=sampling.repetition_penalty,
            logit_bias=tuple(sampling.logit_bias.items()),
            logprobs=sampling.logprobs,
            history=tuple(self.tokens) if _has_penalty(self.request) else (),
            prompt_len=self.prompt_len,
            banned=() if may_end or self.grammar is not None else self.eos_ids,
            mask=self.grammar.mask(may_end=may_end) if self.grammar is not None else None,
        )

    @property
    def guess_room(self) -> int:
        """How many guesses may follow the last token: what they yield must count like as many single steps."""
        if self.grammar is not None:
            return 0  # a guess would need the masks after it
        room = self.tokens_max - len(self.tokens) - 1
        if self.generated < self.request.sampling.min_tokens:
            room = min(room, self.request.sampling.min_tokens - self.generated - 1)
        return max(0, room)

    def push(self, draws: Items[Draw], vocabulary: Vocabulary) -> Tokens:
        """Add generated tokens, up to the one that ends the answer, and return the event that says so."""
        offset = self.generated
        ids: list[int] = []
        logprobs: list[TokenLogprob] = []
        for drawn in draws:
            if not self._follow(drawn.token):
                break
            self.tokens.append(drawn.token)
            self.text.push(drawn.token)
            ids.append(drawn.token)
            logprobs += _logprobs(drawn, vocabulary)
            if self.has_ended:
                break
        if self.has_ended and not self.text.is_stopped:
            self.text.finish()
        text, text_offset = self.text.take()
        return Tokens(
            attempt=self.request.attempt,
            offset=offset,
            ids=tuple(ids),
            text=text,
            text_offset=text_offset,
            logprobs=tuple(logprobs),
        )

    def _follow(self, token: int) -> bool:
        """Move on in the grammar; False when the token has no place in it."""
        if self.grammar is not None:
            try:
                self.grammar.advance(token)
            except CoveyError as error:
                self.failure = error
                return False
        return True

    @property
    def base(self) -> int:
        """The position that `blocks` begin with."""
        return self.elsewhere.tokens if self.elsewhere is not None else 0

    def wait_for_kv(self, now: float) -> None:
        """It stands still until more of its keys and values are loaded."""
        self.waits_since = now

    def got_kv(self, now: float) -> None:
        """What it stood still for is there."""
        if self.waits_since is not None:
            self.kv_wait_s += now - self.waits_since
            self.waits_since = None

    def usage(self) -> Usage:
        """Counts so far; tokens of earlier workers included."""
        return Usage(
            prompt_tokens=self.prompt_len,
            completion_tokens=self.generated,
            cached_tokens=min(self.cached_tokens, self.prompt_len),
            loaded_tokens=min(self.loaded_tokens, self.prompt_len),
            blocks_moved=self.blocks_moved,
        )

    def timings(self, now: float) -> Timings:
        """Where the time went until `now`."""
        first = self.first_token_at or now
        return Timings(
            queue_s=(self.admitted_at or now) - self.submitted_at,
            lookup_s=self.lookup_s,
            transfer_s=self.transfer_s,
            kv_wait_s=self.kv_wait_s,
            prefill_s=first - self.started_at if self.started_at else 0.0,
            decode_s=now - first,
        )

    def show(self, stage: Stage) -> None:
        """Set what a silent stream shows."""
        self.outbox.show(stage, done=self.computed, total=len(self.tokens))


def _has_penalty(request: GenerateRequest) -> bool:
    sampling = request.sampling
    penalties = (sampling.presence_penalty, sampling.frequency_penalty, sampling.repetition_penalty)
    return penalties != (0.0, 0.0, 1.0)


def _logprobs(drawn: Draw, vocabulary: Vocabulary) -> tuple[TokenLogprob, ...]:
    if drawn.logprob is None:
        return ()
    top = tuple(TopLogprob(id=i, token=vocabulary.token_bytes(i), logprob=value) for i, value in drawn.top)
    token = vocabulary.token_bytes(drawn.token)
    return (TokenLogprob(id=drawn.token, token=token, logprob=drawn.logprob, top=top),)
