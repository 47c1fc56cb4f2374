"""The requests that an engine has taken and not ended, by each of their names."""

from __future__ import annotations

from covey.types.ids import RequestId

from .outbox import Outbox
from .sequence import Sequence


class Register:
    """Sequences by number, by reader and by request id; a newer attempt takes the place of an older one."""

    def __init__(self) -> None:
        self._by_id: dict[int, Sequence] = {}
        self._by_outbox: dict[Outbox, Sequence] = {}
        self._by_request: dict[RequestId, Sequence] = {}

    def __len__(self) -> int:
        return len(self._by_id)

    def add(self, seq: Sequence) -> None:
        """Enter a sequence; the former one of its request must have been removed."""
        self._by_id[seq.id] = self._by_outbox[seq.outbox] = self._by_request[seq.request.request_id] = seq

    def remove(self, seq: Sequence) -> None:
        """Strike a sequence out."""
        del self._by_id[seq.id], self._by_outbox[seq.outbox], self._by_request[seq.request.request_id]

    def get(self, seq_id: int) -> Sequence | None:
        """The sequence of this number, while it lives."""
        return self._by_id.get(seq_id)

    def running(self, seq_id: int) -> Sequence:
        """The sequence of this number, which the batcher knows and which therefore lives."""
        seq = self._by_id.get(seq_id)
        assert seq is not None, "the batcher plans live sequences only"
        return seq

    def of_outbox(self, outbox: Outbox) -> Sequence | None:
        """The sequence that writes to this outbox."""
        return self._by_outbox.get(outbox)

    def of_request(self, request_id: RequestId) -> Sequence | None:
        """The sequence of this request."""
        return self._by_request.get(request_id)

    def all(self) -> tuple[Sequence, ...]:
        """Every live sequence, oldest first."""
        return tuple(self._by_id.values())
