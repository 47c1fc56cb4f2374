"""From a request to a sequence: everything that can be wrong with it is found here, before it holds anything."""

from __future__ import annotations

import math
from collections.abc import Collection

from covey.errors import ContextLengthExceeded, InvalidArgument
from covey.model.grammar import CompiledGrammar
from covey.model.plan import RunnerInfo
from covey.types.generate import GenerateRequest, Role

from .chain import BlockChain
from .outbox import Outbox
from .sequence import Sequence
from .text import TextPipe, Vocabulary


class Intake:
    """Checks requests against what the runner can do, and numbers them."""

    def __init__(
        self, info: RunnerInfo, vocabulary: Vocabulary, role: Role, model: str, *, borrow_blocks: int = 0
    ) -> None:
        """`borrow_blocks` of a sequence may be with other workers."""
        self.model = model
        self._borrow_blocks = borrow_blocks
        self._info = info
        self._vocabulary = vocabulary
        self._role = role
        self._count = 0

    @property
    def context_limit(self) -> int:
        """Tokens of the longest sequence: what the model allows, or what the pool and other workers hold."""
        window = _window(self._info.n_blocks)
        blocks = max(self._info.n_blocks, window + self._borrow_blocks) if self._borrow_blocks else self._info.n_blocks
        return min(self._info.context_limit, blocks * self._info.block_size)

    def accept(
        self, request: GenerateRequest, outbox: Outbox, now: float, grammar: CompiledGrammar | None = None
    ) -> Sequence:
        """Build the sequence of a request with its grammar. Raises InvalidArgument or ContextLengthExceeded."""
        self._validate(request)
        emitted, text_offset = _emitted(request)
        tokens = [*request.token_ids, *emitted]
        tokens_max = min(self.context_limit, len(request.token_ids) + request.sampling.max_tokens)
        chain = BlockChain(request.scopes, self._info.block_size)
        chain.extend(tokens)
        text = TextPipe(self._vocabulary, request.stop, min_tokens=request.sampling.min_tokens, sent=text_offset)
        for token in emitted:
            text.push(token)
        last = len(tokens) if self._role is Role.PREFILL else max(len(tokens), tokens_max - 1)
        self._count += 1
        blocks = -(-last // self._info.block_size)
        is_long = blocks > self._info.n_blocks
        return Sequence(
            id=self._count,
            request=request,
            outbox=outbox,
            chain=chain,
            text=text,
            tokens=tokens,
            tokens_max=tokens_max,
            blocks_needed=_window(self._info.n_blocks) if is_long else blocks,
            is_long=is_long,
            deadline=now + request.deadline_s,
            submitted_at=now,
            eos_ids=self._info.eos_ids,
            handed_over=request.ticket.covered if request.ticket is not None else 0,
            grammar=grammar.start(emitted) if grammar is not None else None,
        )

    def _validate(self, request: GenerateRequest) -> None:
        if request.model and request.model != self.model:
            raise InvalidArgument(f"this worker serves {self.model}", field="model")
        if not request.token_ids:
            raise InvalidArgument("the prompt is empty", field="token_ids")
        if len(request.token_ids) >= self.context_limit:
            raise ContextLengthExceeded(
                f"the prompt has {len(request.token_ids)} tokens; this model's context of {self.context_limit} "
                "must hold the prompt and at least one more",
                field="token_ids",
            )
        self._check_ids(request.token_ids, "token_ids")
        self._check_ids(_emitted(request)[0], "resume.emitted")
        self._check_ids(request.sampling.logit_bias, "sampling.logit_bias")
        if not all(math.isfinite(bias) for bias in request.sampling.logit_bias.values()):
            raise InvalidArgument("a bias must be a finite number", field="sampling.logit_bias")
        if request.sampling.max_tokens < 1:
            raise InvalidArgument("must be at least 1", field="sampling.max_tokens")
        if self._role is Role.PREFILL and request.ticket is not None:
            raise InvalidArgument("a prefill worker takes no ticket", field="ticket")
        _validate_emitted(request, self.context_limit)

    def _check_ids(self, ids: Collection[int], field: str) -> None:
        if ids and not 0 <= min(ids) <= max(ids) < self._info.vocab_size:
            raise InvalidArgument(f"token ids must be from 0 to {self._info.vocab_size - 1}", field=field)


def _validate_emitted(request: GenerateRequest, context_limit: int) -> None:
    emitted, _ = _emitted(request)
    if len(request.token_ids) + len(emitted) > context_limit:
        raise ContextLengthExceeded("the prompt and the emitted tokens exceed the context", field="resume.emitted")
    ticket = request.ticket
    if ticket is None:
        return
    if emitted[: len(ticket.emitted)] != ticket.emitted:
        raise InvalidArgument("must begin with the ticket's tokens", field="resume.emitted")
    if ticket.covered > len(request.token_ids) + len(ticket.emitted):
        raise InvalidArgument("covers more tokens than there are", field="ticket.covered")


def _emitted(request: GenerateRequest) -> tuple[tuple[int, ...], int]:
    """What the client has: `resume` is the newer word, the ticket's tokens were sent at hand-over."""
    if request.resume is not None:
        return request.resume.emitted, request.resume.text_offset
    if request.ticket is not None:
        return request.ticket.emitted, request.ticket.text_offset
    return (), 0


def _window(n_blocks: int) -> int:
    """Blocks that a sequence which is longer than the pool has here: the others run beside it."""
    return max(2, n_blocks // 2)
