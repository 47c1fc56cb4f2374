"""Bringing a sequence's stored blocks into the pool before it runs."""

from __future__ import annotations

from covey import failpoint
from covey.types.generate import Role, Stage
from covey.types.ids import WorkerId

from .holdings import Holdings
from .migration import tail_of
from .sequence import Sequence
from .transfer import Fetched, Transfers


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
        """Load full blocks along the chain, then, if a ticket names one, the unfinished block after them."""
        assert self._transfers is not None
        first, end = len(seq.blocks), self._holdings.reusable(seq)
        owner = f"{self._worker}/{seq.id}"
        self._holdings.cover(seq, end * self._block_size)
        if end > first:
            seq.show(Stage.LOOKUP)
            stretches = tuple(seq.chain.stretches(first, end))
            tenant, blocks = seq.request.tenant, seq.blocks[first:end]
            fetched = await self._transfers.fetch(tenant, stretches, blocks, owner=owner)
            self._book(seq, fetched, seq.computed + fetched.blocks * self._block_size)
            seq.stored = seq.computed // self._block_size
        await self._load_tail(seq, owner)
        seq.loaded_tokens = seq.computed - seq.cached_tokens
        await failpoint.hit_async(self._failpoint)

    async def _load_tail(self, seq: Sequence, owner: str) -> None:
        assert self._transfers is not None
        index = seq.handed_over // self._block_size
        if seq.computed != index * self._block_size or seq.handed_over >= len(seq.tokens):
            return  # a block before it is missing, or there is no ticket
        tail = tail_of(seq, seq.handed_over, self._block_size)
        if tail is not None:
            seq.show(Stage.TRANSFER)
            self._holdings.cover(seq, seq.handed_over)
            fetched = await self._transfers.fetch_tail(tail, seq.blocks[index], owner=owner)
            self._book(seq, fetched, seq.handed_over if fetched.blocks else seq.computed)

    @staticmethod
    def _book(seq: Sequence, fetched: Fetched, computed: int) -> None:
        seq.lookup_s += fetched.lookup_s
        seq.transfer_s += fetched.transfer_s
        seq.blocks_moved += fetched.blocks
        seq.computed = computed
