"""The other workers of the registry that blocks of a long sequence may go to."""

from __future__ import annotations

from collections.abc import Sequence

from covey.net.registry import Registry
from covey.net.rpc import Channel, Channels
from covey.types.event import WorkerState
from covey.types.generate import EngineInfo, Role
from covey.types.ids import WorkerId

from .borrowing import Lender

SILENT_S = 5.0
"""A worker that was not heard of for so long is asked for nothing."""


class RegistryNeighbours:
    """`borrowing.Neighbours`: decode workers whose blocks look like ours."""

    def __init__(self, registry: Registry, channels: Channels, worker: WorkerId) -> None:
        self._registry = registry
        self._channels = channels
        self._worker = worker

    def lenders(self) -> Sequence[Lender]:
        """See `borrowing.Neighbours.lenders`."""
        views = [view for view in self._registry.workers(Role.DECODE) if view.record.engine is not None]
        own = next((view.record.engine for view in views if view.record.worker == self._worker), None)
        return [
            Lender(worker=view.record.worker, address=view.record.address, lendable=view.load.lendable_blocks)
            for view in views
            if own is not None
            and view.record.worker != self._worker
            and view.record.state is WorkerState.READY
            and view.age_s < SILENT_S
            and view.record.engine is not None
            and _layout(view.record.engine) == _layout(own)
        ]

    def to(self, address: str) -> Channel:
        """See `borrowing.Neighbours.to`."""
        return self._channels.to(address)


def _layout(info: EngineInfo) -> tuple[str, str, str, str, int, int]:
    """What must be the same for one worker's blocks to mean the same to another."""
    return info.model, info.revision, info.layout_fingerprint, info.kv_dtype, info.block_size, info.block_bytes
