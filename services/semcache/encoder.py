"""The encoder as an actor: loads its model at its first message, then encodes what waits in batches, on one thread."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum, auto

import anyio
from anyio import to_thread
from structlog.typing import FilteringBoundLogger

from covey.actor import Ask, Inbox, Ref
from covey.clock import Clock
from covey.errors import CoveyError, DeadlineExceeded, Unavailable
from covey.types.ids import TenantId

from .minilm import Encoded, EncoderModel

RETRY_AFTER_MS = 2000
"""What callers are told to wait while the encoder loads."""
MEMO_CHARS_MAX = 4096
"""Longer texts are encoded each time, so that the memo's size is bounded."""


class Phase(Enum):
    LOADING = auto()
    READY = auto()
    FAILED = auto()


@dataclass(slots=True)
class EncoderStatus:
    """Where the encoder is; written by its actor, read by everyone."""

    phase: Phase = Phase.LOADING
    why: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Encode(Ask[tuple[Encoded, ...]]):
    texts: tuple[str, ...]


class Encoder:
    """Owns the model and the thread that computes; asks that arrive before it is loaded wait in the inbox.

    The first ask starts the load; one without texts does nothing else.
    """

    def __init__(
        self,
        load: Callable[[], EncoderModel],
        status: EncoderStatus,
        *,
        batch_max: int,
        clock: Clock,
        log: FilteringBoundLogger,
    ) -> None:
        self._load = load
        self._status = status
        self._batch_max = batch_max
        self._clock = clock
        self._log = log
        self._thread = anyio.CapacityLimiter(1)

    async def run(self, inbox: Inbox[Encode]) -> None:
        self._status.phase = Phase.LOADING
        async with anyio.create_task_group() as tg:
            loaded: list[EncoderModel] = []
            done: anyio.Event | None = None
            async for ask in inbox:
                if done is None:
                    done = anyio.Event()
                    tg.start_soon(self._load_model, loaded, done)
                await done.wait()
                await self._serve(loaded, [ask, *self._more(inbox, len(ask.texts))])
            tg.cancel_scope.cancel()  # stopped while loading: nobody waits for the model any more

    async def _load_model(self, loaded: list[EncoderModel], done: anyio.Event) -> None:
        began = self._clock.now()
        try:
            loaded.append(await to_thread.run_sync(self._load, limiter=self._thread, abandon_on_cancel=True))
            self._status.phase = Phase.READY
            self._log.info("encoder loaded", seconds=round(self._clock.now() - began, 2))
        except (CoveyError, ImportError, OSError, ValueError, RuntimeError) as error:
            # The cache goes on with its exact tier: a broken encoder must cost nobody an answer.
            self._status.phase = Phase.FAILED
            self._status.why = f"the encoder could not be loaded: {error}"
            self._log.error("encoder not loaded: the semantic tier stays off", error=str(error))
        finally:
            done.set()

    def _more(self, inbox: Inbox[Encode], rows: int) -> list[Encode]:
        asks: list[Encode] = []
        while rows < self._batch_max and (ask := inbox.next()) is not None:
            asks.append(ask)
            rows += len(ask.texts)
        return asks

    async def _serve(self, loaded: list[EncoderModel], asks: list[Encode]) -> None:
        asks = [ask for ask in asks if not ask.reply.abandoned]
        if not loaded:
            for ask in asks:
                ask.reply.fail(Unavailable(self._status.why))
            return
        texts = [text for ask in asks for text in ask.texts]
        if not texts:
            return
        encoded = iter(await to_thread.run_sync(loaded[0].encode, texts, limiter=self._thread))
        for ask in asks:
            ask.reply.set(tuple(next(encoded) for _ in ask.texts))


class Embedder:
    """The encoder as the rest of the service sees it: under a deadline, with a memo of recent texts.

    The memo is kept by tenant: timing must not tell one tenant what another one asked.
    """

    def __init__(self, encoder: Ref[Encode], status: EncoderStatus, *, memo_max: int) -> None:
        self._encoder = encoder
        self._status = status
        self._memo_max = memo_max
        self._memo: OrderedDict[tuple[TenantId, str], Encoded] = OrderedDict()

    @property
    def ready(self) -> bool:
        return self._status.phase is Phase.READY

    @property
    def unready_why(self) -> str:
        """Why nothing can be encoded now; empty when ready."""
        return self._status.why or ("" if self.ready else "the encoder is still loading")

    async def one(self, tenant: TenantId, text: str, *, timeout_s: float) -> Encoded:
        """Encode a request's text; raises what `many` raises."""
        key = (tenant, text)
        if (known := self._memo.get(key)) is not None:
            self._memo.move_to_end(key)
            return known
        (encoded,) = await self.many((text,), timeout_s=timeout_s)
        if len(text) <= MEMO_CHARS_MAX:
            self._memo[key] = encoded
        while len(self._memo) > self._memo_max:
            self._memo.popitem(last=False)
        return encoded

    def forget(self, tenant: TenantId) -> None:
        """Drop every text of a tenant from the memo."""
        for key in [key for key in self._memo if key[0] == tenant]:
            del self._memo[key]

    async def many(self, texts: Sequence[str], *, timeout_s: float) -> tuple[Encoded, ...]:
        """Encode texts, waiting for the model and for earlier work up to `timeout_s`.

        Raises:
            Unavailable: the model is not loaded in time, or cannot be; with a hint when to try again.
            ActorCrashed: the model failed on these texts.
            DeadlineExceeded: it is loaded, but busy for longer.
        """
        if self._status.phase is Phase.FAILED:
            raise Unavailable(self._status.why)
        try:
            return await self._encoder.ask(
                Encode(texts=tuple(texts)), timeout_s=timeout_s if timeout_s < math.inf else None
            )
        except DeadlineExceeded as error:
            if self.ready:
                raise
            raise Unavailable(self.unready_why, retry_after_ms=RETRY_AFTER_MS) from error
