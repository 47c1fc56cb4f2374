"""Bringing a sequence's stored blocks into the pool before it runs."""

from __future__ import annotations

from covey import failpoint
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
        self, transfers: Transfers | None, holdings: Holdings, *, block_size: int, role: Role, worker: WorkerId
    ) -> None:
        self._transfers = transfers
        self._holdings = holdings
        self._block_size = block_size
        self._failpoint = f"{role.value.lower()}.after_load"
        self._worker = worker

    def can_load(self, seq: Sequence) -> bool:
        """Whether the store may have something that this worker's own cache has not."""
        if self._transfers is None:
            return False
        return len(seq.blocks) < self._holdings.reusable(seq) or seq.handed_over > seq.computed

    async def load(self, seq: Sequence) -> None:
        """Load along the chain, and, if a ticket names one, the unfinished block at its end."""
        assert self._transfers is not None
        seq.show(Stage.LOOKUP)
        first, size = len(seq.blocks), self._block_size
        stretches, end, tail_len = self._wanted(seq)
        has_room = self._holdings.cover(seq, end * size + tail_len)
        assert has_room, "known tokens are promised at admission"
        fetched = await self._transfers.fetch(
            seq.request.tenant, stretches, seq.blocks[first:], skip=first, owner=f"{self._worker}/{seq.id}"
        )
        good = first + fetched.blocks
        seq.lookup_s += fetched.lookup_s
        seq.transfer_s += fetched.transfer_s
        seq.blocks_moved += fetched.blocks
        seq.stored = min(good, end)
        seq.computed = end * size + tail_len if good > end else good * size
        if not seq.preemptions:
            seq.loaded_tokens = seq.computed - seq.cached_tokens
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
