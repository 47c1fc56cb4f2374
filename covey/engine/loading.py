"""Bringing a sequence's stored blocks into the pool, before it runs or layer by layer while it does."""

from __future__ import annotations

from collections.abc import Callable

from covey import failpoint
from covey.clock import Clock
from covey.types.generate import Role, Stage
from covey.types.ids import WorkerId

from .chain import Stretch
from .holdings import Holdings
from .migration import tail_of
from .sequence import Sequence
from .transfer import Transfers


class Loader:
    """Loads what the store has of a prompt; what is missing is computed later, so nothing here fails a request."""

    def __init__(
        self,
        transfers: Transfers | None,
        holdings: Holdings,
        clock: Clock,
        *,
        block_size: int,
        role: Role,
        worker: WorkerId,
    ) -> None:
        self._transfers = transfers
        self._holdings = holdings
        self._clock = clock
        self._block_size = block_size
        self._failpoint = f"{role.value.lower()}.after_load"
        self._worker = worker

    def can_load(self, seq: Sequence) -> bool:
        """Whether the store may have something that this worker's own cache has not."""
        if self._transfers is None or seq.is_long:
            return False
        return len(seq.blocks) < self._holdings.reusable(seq) or seq.handed_over > seq.computed

    async def load(self, seq: Sequence, on_layers: Callable[[int, int], None] | None) -> None:
        """Load along the chain, and, if a ticket names one, the unfinished block at its end; sets `brought`.

        `on_layers` is called with (tokens, layers) as leading layers of so many tokens come in: tokens that are likely
        to be there in the end, not sure.
        """
        assert self._transfers is not None
        seq.show(Stage.LOOKUP)
        seq.wait_for_kv(self._clock.now())
        first, size = len(seq.blocks), self._block_size
        stretches, end, tail_len = self._wanted(seq)
        has_room = self._holdings.cover(seq, end * size + tail_len)
        assert has_room, "known tokens are promised at admission"

        def tokens(blocks: int) -> int:
            return end * size + tail_len if blocks > end else blocks * size

        fetched = await self._transfers.fetch(
            seq.request.tenant,
            stretches,
            seq.blocks[first:],
            skip=first,
            owner=f"{self._worker}/{seq.id}",
            has_tail=tail_len > 0,
            on_layers=None if on_layers is None else lambda blocks, n: on_layers(tokens(first + blocks), n),
        )
        good = first + fetched.blocks
        seq.lookup_s += fetched.lookup_s
        seq.transfer_s += fetched.transfer_s
        seq.blocks_moved += fetched.blocks
        seq.stored = min(good, end)
        seq.brought = tokens(good)
        seq.got_kv(self._clock.now())
        if not seq.preemptions:
            seq.loaded_tokens = seq.brought - seq.cached_tokens
        await failpoint.hit_async(self._failpoint)

    def _wanted(self, seq: Sequence) -> tuple[list[Stretch], int, int]:
        """The chain to look up from its start, its full blocks, and the tokens of the unfinished block after them."""
        end = self._holdings.reusable(seq)
        if not 0 < seq.handed_over < len(seq.tokens):
            return list(seq.chain.stretches(0, end)), end, 0
        end = max(seq.handed_over // self._block_size, len(seq.blocks))
        stretches = list(seq.chain.stretches(0, end))
        tail = tail_of(seq, seq.handed_over, self._block_size)
        if tail is None or end > seq.handed_over // self._block_size:
            return stretches, end, 0
        last = stretches[-1] if stretches else None
        if last is not None and tail.key.parent:
            stretches[-1] = Stretch(namespace=last.namespace, first=last.first, keys=(*last.keys, tail.key))
        else:
            stretches.append(Stretch(namespace=tail.namespace, first=end, keys=(tail.key,)))
        return stretches, end, seq.handed_over - end * self._block_size
