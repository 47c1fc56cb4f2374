"""A runner without a model: tokens follow from what stands in the blocks, so a wrong block shows as a wrong token."""

from __future__ import annotations

import threading
from hashlib import blake2b

import numpy as np
from numpy.typing import NDArray

from covey.errors import InvalidArgument
from covey.model.plan import Draw, Row, RunnerInfo, Sampled, SampleSpec, StepOutcome, StepPlan
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

    A position's key is a mix of its token and its place, written to every layer. `step_s` is how long a step takes;
    `bad_token` makes a row that contains it fail, as a NaN would.
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
        bad_token: int | None = None,
        model: str = "fake",
    ) -> None:
        self._keys: NDArray[np.uint64] = np.zeros((n_blocks, layers, block_size), np.uint64)
        self._step_s = step_s
        self._bad_token = bad_token
        self.steps = 0
        """Steps so far."""
        self.computed = 0
        """Positions computed so far: what caches and stores save."""
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

    def step(self, plan: StepPlan) -> StepOutcome:
        """Write the rows' keys, then draw. Raises InvalidArgument when a sequence has two rows."""
        if len({row.seq for row in plan.rows}) != len(plan.rows):
            raise InvalidArgument("a sequence has two rows in one step", field="rows")
        if self._step_s:
            threading.Event().wait(self._step_s)
        self.steps += 1
        failed = [(row.seq, "the model's logits are not finite") for row in plan.rows if self._bad_token in row.tokens]
        good = [row for row in plan.rows if self._bad_token not in row.tokens]
        for row in good:
            self._write(row)
        sampled = [self._draw(row, row.sample) for row in good if row.sample is not None]
        return StepOutcome(sampled=tuple(sampled), failed=tuple(failed))

    def block_view(self, block_id: int) -> memoryview:
        """The writable bytes of one block."""
        return memoryview(self._keys[block_id]).cast("B")

    def close(self) -> None:
        """Nothing to give back."""

    def _write(self, row: Row) -> None:
        size = self.info.block_size
        end = row.start + len(row.tokens)
        assert end <= self.info.context_limit
        assert end <= len(row.blocks) * size, "the block table does not cover the row"
        for position, token in enumerate(row.tokens, row.start):
            key = np.uint64(((token + 1) * 0x100000001B3 ^ (position + 1) * 0x1000193) & 0xFFFFFFFFFFFFFFFF)
            self._keys[row.blocks[position // size], :, position % size] = key
        self.computed += len(row.tokens)

    def _draw(self, row: Row, spec: SampleSpec) -> Sampled:
        end = row.start + len(row.tokens)
        assert spec.position == end, "the drawn token follows the row"
        keys = self._keys[list(row.blocks)].transpose(1, 0, 2).reshape(self.info.n_layers, -1)[:, :end]
        places = np.arange(1, end + 1, dtype=np.uint64) * _MIX
        digest = blake2b((keys * places).sum(axis=1, dtype=np.uint64).tobytes(), digest_size=8)
        if spec.temperature > 0:
            digest.update(f"{spec.seed}:{spec.position}".encode())
        if spec.has_penalty:
            digest.update(f"{spec.prompt_len}:{spec.history}".encode())
        token = int.from_bytes(digest.digest(), "little") % self.info.vocab_size
        while token in spec.banned:
            token = (token + 1) % self.info.vocab_size
        if spec.logprobs is None:
            return Sampled(seq=row.seq, draws=(Draw(token=token),))
        rivals = tuple(((token + i) % self.info.vocab_size, -1.0 - i) for i in range(spec.logprobs))
        return Sampled(seq=row.seq, draws=(Draw(token=token, logprob=-1.0, top=rivals),))
