"""A runner without a model: tokens follow from what stands in the blocks, so a wrong block shows as a wrong token."""

from __future__ import annotations

import threading
from dataclasses import replace
from hashlib import blake2b

import numpy as np
from numpy.typing import NDArray

from covey.errors import InvalidArgument
from covey.model.plan import Draw, Interrupt, Row, RunnerInfo, Sampled, SampleSpec, StepOutcome, StepPlan
from covey.model.text_stream import TextStream

_MIX = np.uint64(0x9E3779B97F4A7C15)


class FakeVocabulary:
    """Token id to bytes: short words, so that stop strings cross token boundaries; ids past 200 are half characters."""

    def token_bytes(self, token: int) -> bytes:
        """The bytes of one token; the end-of-text token 0 has none."""
        if token == 0:
            return b""
        if token > 200:
            return b"\xc3" if token % 2 else b"\xa9"
        return chr(97 + token % 26).encode() + (b" " if token % 3 == 0 else b"")

    def text_stream(self) -> TextStream:
        """A new incremental decoder."""
        return TextStream(self.token_bytes)


class FakeRunner:
    """`covey.model.plan.Runner` with deterministic tokens: a hash of all keys that the block table leads to.

    A position's key is a mix of its token and its place, written to a layer when that layer runs. `step_s` is how long
    a step takes, `layer_s` a layer; `bad_token` makes a row that contains it fail, as a NaN would.
    """

    def __init__(
        self,
        *,
        n_blocks: int = 64,
        block_size: int = 8,
        layers: int = 2,
        vocab_size: int = 256,
        context_limit: int = 256,
        step_s: float = 0.0,
        layer_s: float = 0.0,
        bad_token: int | None = None,
        model: str = "fake",
    ) -> None:
        self._keys: NDArray[np.uint64] = np.zeros((n_blocks, layers, block_size), np.uint64)
        self._step_s = step_s
        self._layer_s = layer_s
        self._bad_token = bad_token
        self._suspended: dict[int, tuple[int, tuple[int, ...], int]] = {}
        self.steps = 0
        """Steps so far."""
        self.layers = 0
        """Layers so far, over all steps: a step that nobody wants any more stops between two."""
        self.computed = 0
        """Positions taken through the last layer so far: what caches and stores save."""
        self.info = RunnerInfo(
            model=model,
            revision="1",
            tokenizer_hash="fake",
            block_size=block_size,
            block_bytes=self._keys[0].nbytes,
            n_blocks=n_blocks,
            context_limit=context_limit,
            layout_fingerprint=f"fake-{layers}-{block_size}",
            precision="fp32",
            kv_dtype="u64",
            eos_ids=(0,),
            n_layers=layers,
            vocab_size=vocab_size,
        )

    def step(self, plan: StepPlan, interrupt: Interrupt | None = None) -> StepOutcome:
        """Write the rows' keys layer by layer, then draw. Raises InvalidArgument where rows contradict each other."""
        self._check(plan.rows)
        if self._step_s:
            threading.Event().wait(self._step_s)
        self.steps += 1
        rows, failed = self._good(plan.rows)
        suspended: list[tuple[int, int]] = []
        first = min((row.first_layer for row in rows), default=0)
        for layer in range(first, self.info.n_layers):
            if layer > first and interrupt is not None:
                rows = self._interrupted(rows, layer, interrupt, suspended)
            rows = self._parked(rows, layer, suspended)
            if not rows:
                break
            if self._layer_s:
                threading.Event().wait(self._layer_s)
            self.layers += 1
            for row in rows:
                if row.first_layer <= layer:
                    self._write(row, layer)
        self.computed += sum(len(row.tokens) for row in rows)
        sampled = [self._sample(row, row.sample) for row in rows if row.sample is not None]
        return StepOutcome(sampled=tuple(sampled), failed=tuple(failed), suspended=tuple(suspended))

    def drop(self, seq: int) -> None:
        """Forget what a sequence left between two layers."""
        self._suspended.pop(seq, None)

    def block_view(self, block_id: int) -> memoryview:
        """The writable bytes of one block."""
        return memoryview(self._keys[block_id]).cast("B")

    def close(self) -> None:
        """Nothing to give back."""

    @property
    def suspended(self) -> int:
        """Sequences that wait between two layers."""
        return len(self._suspended)

    def _check(self, rows: tuple[Row, ...]) -> None:
        if len({row.seq for row in rows}) != len(rows):
            raise InvalidArgument("a sequence has two rows in one step", field="rows")
        ranges = {(row.first_layer, self._end(row)) for row in rows} - {(0, self.info.n_layers)}
        if len(ranges) > 1:
            raise InvalidArgument("rows that run through some layers must share one range", field="rows")

    def _end(self, row: Row) -> int:
        return self.info.n_layers if row.last_layer is None else row.last_layer

    def _good(self, rows: tuple[Row, ...]) -> tuple[list[Row], list[tuple[int, str]]]:
        good, failed = [], []
        for row in rows:
            left = self._suspended.pop(row.seq, None)
            if row.first_layer and left != (row.start, row.tokens, row.first_layer):
                failed.append((row.seq, f"nothing of this row waits at layer {row.first_layer}"))
            elif self._bad_token in row.tokens:
                failed.append((row.seq, "the model's logits are not finite"))
            else:
                assert 0 <= row.first_layer < self._end(row) <= self.info.n_layers
                assert 0 <= row.draft < len(row.tokens)
                assert not row.draft or (
                    row.sample is not None and self._end(row) - row.first_layer == self.info.n_layers
                )
                assert row.start + len(row.tokens) <= self.info.context_limit
                assert row.start + len(row.tokens) <= len(row.blocks) * self.info.block_size, "the block table is short"
                good.append(row)
        return good, failed

    def _interrupted(
        self, rows: list[Row], layer: int, interrupt: Interrupt, suspended: list[tuple[int, int]]
    ) -> list[Row]:
        """What goes on into `layer` after a look at the interrupt."""
        unwanted = interrupt.cancelled()
        rows = [row for row in rows if row.seq not in unwanted]
        if not interrupt.is_preempted():
            return rows
        for row in rows:
            if len(row.tokens) - row.draft > 1:
                self._suspend(row, max(layer, row.first_layer), suspended)
        return [row for row in rows if len(row.tokens) - row.draft == 1]

    def _parked(self, rows: list[Row], layer: int, suspended: list[tuple[int, int]]) -> list[Row]:
        """Leave out the rows whose range ends before `layer`."""
        for row in rows:
            if self._end(row) == layer:
                self._suspend(row, layer, suspended)
        return [row for row in rows if self._end(row) > layer]

    def _suspend(self, row: Row, layer: int, suspended: list[tuple[int, int]]) -> None:
        self._suspended[row.seq] = (row.start, row.tokens, layer)
        suspended.append((row.seq, layer))

    def _write(self, row: Row, layer: int) -> None:
        size = self.info.block_size
        for position, token in enumerate(row.tokens, row.start):
            key = np.uint64(((token + 1) * 0x100000001B3 ^ (position + 1) * 0x1000193) & 0xFFFFFFFFFFFFFFFF)
            self._keys[row.blocks[position // size], layer, position % size] = key

    def _sample(self, row: Row, spec: SampleSpec) -> Sampled:
        """Draw after the last token that is no guess, and after each guess for as long as it is what was drawn."""
        end = row.start + len(row.tokens) - row.draft
        assert spec.position == end, "the drawn token follows the row"
        draws: list[Draw] = []
        for index in range(row.draft + 1):
            history = (*spec.history, *(drawn.token for drawn in draws)) if spec.has_penalty else ()
            here = replace(spec, position=end + index, history=history)
            draws.append(self._draw(row, here))
            if index < row.draft and draws[-1].token != row.tokens[len(row.tokens) - row.draft + index]:
                break
        return Sampled(seq=row.seq, draws=tuple(draws))

    def _draw(self, row: Row, spec: SampleSpec) -> Draw:
        end, size = spec.position, self.info.vocab_size
        keys = self._keys[list(row.blocks)].transpose(1, 0, 2).reshape(self.info.n_layers, -1)[:, :end]
        places = np.arange(1, end + 1, dtype=np.uint64) * _MIX
        digest = blake2b((keys * places).sum(axis=1, dtype=np.uint64).tobytes(), digest_size=8)
        if spec.temperature > 0:
            digest.update(f"{spec.seed}:{spec.position}".encode())
        if spec.has_penalty:
            digest.update(f"{spec.prompt_len}:{spec.history}".encode())
        words = spec.mask.words() if spec.mask is not None else None
        token = int.from_bytes(digest.digest(), "little") % size
        while token in spec.banned or (words is not None and not int(words[token // 32]) >> (token % 32) & 1):
            token = (token + 1) % size
        if spec.logprobs is None:
            return Draw(token=token)
        rivals = tuple(((token + i) % size, -1.0 - i) for i in range(spec.logprobs))
        return Draw(token=token, logprob=-1.0, top=rivals)
