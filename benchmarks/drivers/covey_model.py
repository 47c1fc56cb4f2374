"""Our runner as a driver: whole steps, with building the plan and drawing the tokens."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import torch

from benchmarks import isa
from benchmarks.drivers.lines import private_output, serve
from covey.model.grammar import CompiledGrammar, GrammarCompiler, GrammarState
from covey.model.matrix import Precision
from covey.model.plan import Row, SampleSpec, StepPlan
from covey.model.runner import open_runner
from covey.model.tokenizer import open_tokenizer

BLOCK_TOKENS = 32
POOL_TOKENS = 64 * 1024
MIXED_CHUNK_TOKENS = 128
GREEDY = SampleSpec()


@dataclass(slots=True)
class Running:
    """A sequence that decodes: `token` was drawn last and its keys and values are not in the cache yet."""

    seq: int
    token: int
    length: int
    blocks: tuple[int, ...]
    grammar: CompiledGrammar | None = None
    state: GrammarState | None = None

    def row(self) -> Row:
        """Its part in the next step."""
        sample = SampleSpec(mask=self.state.mask()) if self.state else GREEDY
        return Row(seq=self.seq, tokens=(self.token,), start=self.length, blocks=self.blocks, sample=sample)

    def add(self, token: int) -> None:
        """What was drawn; a constrained text that is complete begins anew."""
        self.token = token
        self.length += 1
        if self.grammar is not None and self.state is not None:
            self.state.advance(token)
            if self.state.is_over:
                self.state = self.grammar.start()
            self.state.mask()  # filled beside the next forward pass


class Covey:
    """One runner; see `benchmarks.drivers` for what its operations mean."""

    def __init__(self, model: str, cache_dir: Path, precision: Precision) -> None:
        torch.set_num_threads(len(os.sched_getaffinity(0)))
        self._model = model
        self._runner = open_runner(
            model,
            cache_dir=cache_dir,
            n_blocks=POOL_TOKENS // BLOCK_TOKENS,
            block_size=BLOCK_TOKENS,
            precision=precision,
            kernels=isa.asked(),
        )
        self._grammars: GrammarCompiler | None = None
        self._used_blocks = 0

    def prefill(self, prompt: list[int]) -> float:
        """Seconds until the first token of one prompt."""
        self._used_blocks = 0
        began = time.perf_counter()
        self._first_token(0, prompt, self._table(len(prompt)))
        return time.perf_counter() - began

    def decode(self, prompts: list[list[int]], steps: int) -> list[float]:
        """Seconds of each of `steps` steps of all prompts together, after their prefill."""
        running = self._started(prompts, steps)
        return [self._step(running) for _ in range(steps)]

    def constrained(self, prompts: list[list[int]], steps: int, grammars: list[str]) -> list[float]:
        """The same, each sequence bound to its grammar (a text of `covey.types.grammar`)."""
        running = self._started(prompts, steps)
        for sequence, text in zip(running, grammars, strict=True):
            sequence.grammar = self._compiler().compile(text)
            sequence.state = sequence.grammar.start()
            sequence.state.mask()
        return [self._step(running) for _ in range(steps)]

    def mixed(self, prompts: list[list[int]], prompt: list[int]) -> dict[str, Any]:
        """Chunks of a new prompt run beside a token of each running sequence."""
        running = self._started(prompts, len(prompt))
        blocks, times = self._table(len(prompt)), []
        for start in range(0, len(prompt), MIXED_CHUNK_TOKENS):
            chunk = tuple(prompt[start : start + MIXED_CHUNK_TOKENS])
            sample = GREEDY if start + len(chunk) == len(prompt) else None
            row = Row(seq=len(prompts), tokens=chunk, start=start, blocks=blocks, sample=sample)
            times.append(self._step(running, row))
        return {"seconds": times, "tokens": len(prompt) + len(times) * len(prompts)}

    def greedy(self, prompt: list[int], count: int) -> list[int]:
        """The tokens that follow a prompt."""
        running = self._started([prompt], count)
        found = [running[0].token]
        while len(found) < count:
            self._step(running)
            found.append(running[0].token)
        return found

    def grid(self, rows: int, context: int, repeats: int) -> list[float]:
        """Seconds of each step of `rows` sequences that have `context` tokens each in the cache."""
        self._used_blocks = 0
        running = [Running(seq, 100 + seq, context, self._table(context + repeats)) for seq in range(rows)]
        for block in range(self._used_blocks):
            view = self._runner.block_view(block)
            view[:] = bytes(len(view))  # pages that were never written are all the same one, and read from the cache
            view.release()
        return [self._step(running) for _ in range(repeats)]

    def kv_bytes_per_token(self) -> float:
        """What one token takes in the cache, over all layers."""
        return self._runner.info.block_bytes / self._runner.info.block_size

    def _step(self, running: Sequence[Running], chunk: Row | None = None) -> float:
        """Seconds of one step: its plan, the pass, the tokens drawn and added."""
        began = time.perf_counter()
        rows = [sequence.row() for sequence in running]
        outcome = self._runner.step(StepPlan(rows=(*rows, chunk) if chunk else tuple(rows)))
        if outcome.failed:
            raise RuntimeError(f"a row failed: {outcome.failed[0][1]}")
        drawn = {sampled.seq: sampled.draws[0].token for sampled in outcome.sampled}
        for sequence in running:
            sequence.add(drawn[sequence.seq])
        return time.perf_counter() - began

    def _started(self, prompts: list[list[int]], steps: int) -> list[Running]:
        self._used_blocks, running = 0, []
        for seq, prompt in enumerate(prompts):
            blocks = self._table(len(prompt) + steps)
            running.append(Running(seq, self._first_token(seq, prompt, blocks), len(prompt), blocks))
        return running

    def _first_token(self, seq: int, prompt: list[int], blocks: tuple[int, ...]) -> int:
        row = Row(seq=seq, tokens=tuple(prompt), start=0, blocks=blocks, sample=GREEDY)
        outcome = self._runner.step(StepPlan(rows=(row,)))
        if outcome.failed:
            raise RuntimeError(f"a row failed: {outcome.failed[0][1]}")
        return outcome.sampled[0].draws[0].token

    def _table(self, tokens: int) -> tuple[int, ...]:
        """A block table for so many tokens, of blocks that no other sequence of this operation has."""
        first = self._used_blocks
        self._used_blocks += -(-tokens // BLOCK_TOKENS)
        return tuple(range(first, self._used_blocks))

    def _compiler(self) -> GrammarCompiler:
        if self._grammars is None:
            info = self._runner.info
            self._grammars = GrammarCompiler(
                open_tokenizer(self._model), vocab_size=info.vocab_size, eos_ids=info.eos_ids
            )
        return self._grammars


def main() -> None:
    """Serve the model that the command line names, from its cache folder, in its precision."""
    lines = private_output()
    model = Covey(sys.argv[1], Path(sys.argv[2]), cast(Precision, sys.argv[3]))
    names = ("prefill", "decode", "constrained", "mixed", "greedy", "grid", "kv_bytes_per_token")
    serve(version("covey"), {name: getattr(model, name) for name in names}, lines)


if __name__ == "__main__":
    main()
