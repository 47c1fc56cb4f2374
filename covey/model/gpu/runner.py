"""The GPU runner: a model, its block pool in device memory and one step over a ragged batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from covey.errors import InvalidArgument
from covey.model.config import ModelConfig
from covey.model.plan import Interrupt, Row, RunnerInfo, StepOutcome, StepPlan

from .batch import build_batch, fresh_block, row_error, upload, written_blocks
from .decoder import GpuDecoder
from .drawing import draw_rows
from .graphs import MAX_ROWS, DecodeGraphs
from .host_windows import HostWindows
from .pages import DevicePool
from .passes import LayerPass, Left, Passed
from .weights import DeviceWeights

_NO_MEMORY = "the device ran out of memory in this step"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Open:
    """What `close` gives back."""

    pool: DevicePool
    decoder: GpuDecoder
    windows: HostWindows
    graphs: DecodeGraphs | None


class GpuRunner:
    """`plan.Runner` on a GPU; on a CPU the same kernels run in Triton's interpreter, without CUDA graphs.

    A step of nothing but single tokens runs from a CUDA graph where there is one: no interrupt is asked amid it, and
    rows cancelled meanwhile are left out at its end. A view of a block is a host copy, which the next step writes back.
    """

    def __init__(
        self, info: RunnerInfo, config: ModelConfig, weights: DeviceWeights, pool: DevicePool, device: torch.device
    ) -> None:
        self.info = info
        self._device = device
        self._left: dict[int, Left] = {}
        decoder = GpuDecoder(config, weights, pool)
        max_blocks = -(-info.context_limit // info.block_size)
        graphs = DecodeGraphs(decoder, max_blocks, device) if device.type == "cuda" else None
        self._parts: _Open | None = _Open(pool=pool, decoder=decoder, windows=HostWindows(pool), graphs=graphs)

    def step(self, plan: StepPlan, interrupt: Interrupt | None = None) -> StepOutcome:
        """See `plan.Runner.step`. Raises InvalidArgument where rows contradict each other, or after `close`."""
        parts = self._open()
        rows, failed = self._check(plan.rows)
        resumed = {row.seq: left for row in rows if (left := self._left.pop(row.seq, None)) is not None}
        if not rows:
            return StepOutcome(failed=tuple(failed))
        try:
            with torch.inference_mode():
                self._prepare(rows, parts)
                passed = self._pass(rows, interrupt, resumed, parts)
                sampled, broken = draw_rows(passed.logits, passed.drawing, passed.broken)
        except torch.OutOfMemoryError:
            return StepOutcome(failed=(*failed, *((row.seq, _NO_MEMORY) for row in rows)))
        parts.windows.refresh(block for row in rows for block in written_blocks(row, self.info.block_size))
        self._left |= passed.left
        suspended = tuple((seq, left.layer) for seq, left in passed.left.items())
        return StepOutcome(sampled=tuple(sampled), failed=(*failed, *broken), suspended=suspended)

    def drop(self, seq: int) -> None:
        """See `plan.Runner.drop`."""
        self._left.pop(seq, None)

    def block_view(self, block_id: int) -> memoryview:
        """See `plan.Runner.block_view`. Raises IndexError for a block outside the pool."""
        return self._open().windows.view(block_id)

    def close(self) -> None:
        """Drop the weights and the pool."""
        self._parts = None
        self._left.clear()

    def _open(self) -> _Open:
        if self._parts is None:
            raise InvalidArgument("the runner is closed", field="runner")
        return self._parts

    def _check(self, rows: Sequence[Row]) -> tuple[list[Row], list[tuple[int, str]]]:
        if len({row.seq for row in rows}) != len(rows):
            raise InvalidArgument("a sequence has two rows in one step", field="rows")
        whole = {(0, None), (0, self.info.n_layers)}
        if len({(row.first_layer, row.last_layer) for row in rows} - whole) > 1:
            raise InvalidArgument("rows that run through some layers must share one range", field="rows")
        good, failed = [], []
        for row in rows:
            error = row_error(row, self.info)
            if error is None and row.first_layer and not ((left := self._left.get(row.seq)) and left.fits(row)):
                error = f"nothing of this row waits at layer {row.first_layer}"
            if error is None:
                good.append(row)
            else:
                failed.append((row.seq, error))
        return good, failed

    def _prepare(self, rows: Sequence[Row], parts: _Open) -> None:
        """Bring what the host wrote, and clear the blocks that begin with this step."""
        parts.windows.write_back()
        begun = [row for row in rows if row.first_layer == 0]
        fresh = [block for row in begun if (block := fresh_block(row, self.info.block_size)) is not None]
        if fresh:
            parts.pool.clear(torch.tensor(fresh).to(self._device))

    def _pass(self, rows: Sequence[Row], interrupt: Interrupt | None, resumed: dict[int, Left], parts: _Open) -> Passed:
        if parts.graphs is None or len(rows) > MAX_ROWS or not all(_is_decode(row, self.info) for row in rows):
            return LayerPass(parts.decoder, self.info, self._device, resumed).run(rows, interrupt)
        batch = build_batch(rows, self.info.block_size, self._device)
        logits = parts.graphs.logits(batch)
        unwanted = interrupt.cancelled() if interrupt is not None else ()
        places = [i for i, row in enumerate(batch.rows) if row.seq not in unwanted]
        if len(places) < len(batch.rows):
            (index,) = upload([torch.tensor(places, dtype=torch.int32).numpy()], self._device)
            logits = logits.index_select(0, index)
        return Passed(drawing=tuple(batch.rows[i] for i in places), logits=logits)


def _is_decode(row: Row, info: RunnerInfo) -> bool:
    """Whether a row is one token through all layers and one draw."""
    is_whole = row.first_layer == 0 and row.last_layer in (None, info.n_layers)
    return is_whole and len(row.tokens) == 1 and row.sample is not None
