"""A run at agentflow, as its client sees it."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from random import Random

import anyio

from covey.codec.methods import Flow
from covey.errors import CoveyError, DeadlineExceeded, Overloaded, Unavailable
from covey.net.rpc import Channel
from covey.retry import Backoff
from covey.types.flow import FlowEvent, RunRequest, RunState, RunView, WaitRun, WatchRun
from covey.types.ids import RunId

RPC_TIMEOUT_S = 30.0
CANCEL_TIMEOUT_S = 90.0
WAIT_S = 60.0
"""One call of `wait`; it is repeated until the caller's own timeout."""
MARGIN_S = 5.0
PATIENCE_S = 60.0
"""How long a lost agentflow is waited for."""
ENDED = (RunState.SUCCEEDED, RunState.FAILED, RunState.CANCELLED)
BACKOFF = Backoff(base_s=0.1, ceiling_s=2.0)


class RunFailed(CoveyError):
    """A run ended without its outputs. `view` is the run; its `error_code` and `error` say why, naming the node."""

    code, grpc, http = "FAILED_PRECONDITION", "FAILED_PRECONDITION", 409

    def __init__(self, view: RunView) -> None:
        why = f": {view.error} ({view.error_code})" if view.error else ""
        super().__init__(f"run {view.run_id} {view.state.value.lower()}{why}")
        self.view = view


class Run:
    """A handle; it may be made again from the run's id with `client.run`."""

    def __init__(self, channel: Channel, run_id: RunId, *, existing: bool = False) -> None:
        self.id = run_id
        self.existing = existing
        """Whether the idempotency key had started it before."""
        self._channel = channel

    def __repr__(self) -> str:
        return f"Run({self.id!r})"

    async def view(self) -> RunView:
        """Return the run as it is now, with all nodes."""
        return await self._channel.call(Flow.GET, RunRequest(run_id=self.id), timeout_s=RPC_TIMEOUT_S)

    async def wait(self, timeout_s: float | None = None) -> RunView:
        """Wait until the run has ended, however it did; agentflow may be restarted meanwhile.

        Raises:
            DeadlineExceeded: it has not ended within `timeout_s`; it goes on.
        """
        until = anyio.current_time() + timeout_s if timeout_s is not None else float("inf")
        patience = _Patience()
        while True:
            left_s = min(until - anyio.current_time(), WAIT_S)
            if left_s <= 0:
                raise DeadlineExceeded(f"run {self.id} has not ended within {timeout_s} s", field="timeout_s")
            try:
                request = WaitRun(run_id=self.id, timeout_s=left_s)
                return await self._channel.call(Flow.WAIT, request, timeout_s=left_s + MARGIN_S)
            except DeadlineExceeded:
                patience.reset()
            except (Unavailable, Overloaded) as error:
                await patience.wait(error)

    async def result(self, timeout_s: float | None = None) -> dict[str, str]:
        """Wait, and return the outputs by node.

        Raises:
            RunFailed: it failed or was cancelled.
            DeadlineExceeded: as `wait`.
        """
        view = await self.wait(timeout_s)
        if view.state is not RunState.SUCCEEDED:
            raise RunFailed(view)
        return dict(view.outputs)

    async def cancel(self) -> RunView:
        """Stop the run; when this returns, its decoding and its tools have stopped."""
        return await self._channel.call(Flow.CANCEL, RunRequest(run_id=self.id), timeout_s=CANCEL_TIMEOUT_S)

    @asynccontextmanager
    async def events(self, *, after_seq: int = 0) -> AsyncIterator[AsyncIterator[FlowEvent]]:
        """Watch the run from after event `after_seq` to its end, each event once, over reconnects.

        `async with run.events() as events: async for event in events: …`; leaving the block ends the watch.
        """
        watch = self._watch(after_seq)
        try:
            yield watch
        finally:
            with anyio.CancelScope(shield=True):
                await watch.aclose()

    async def _watch(self, seq: int) -> AsyncGenerator[FlowEvent, None]:
        patience = _Patience()
        while True:
            try:
                request = WatchRun(run_id=self.id, after_seq=seq)
                async with self._channel.stream(Flow.WATCH, request, timeout_s=None) as events:
                    async for event in events:
                        seq = event.seq
                        patience.reset()
                        yield event
                return
            except (Unavailable, Overloaded) as error:
                await patience.wait(error)


class _Patience:
    """Bounds how long a lost service is waited for."""

    def __init__(self) -> None:
        self._rng = Random()  # noqa: S311 - jitter, not a secret
        self.reset()

    def reset(self) -> None:
        self._tries = 0
        self._until = float("inf")

    async def wait(self, error: CoveyError) -> None:
        """Sleep before the next try, or raise `error` when patience is at an end."""
        now = anyio.current_time()
        self._until = min(self._until, now + PATIENCE_S)
        if now >= self._until:
            raise error
        await anyio.sleep(BACKOFF.delay_s(self._tries, self._rng, retry_after_ms=error.retry_after_ms))
        self._tries += 1
