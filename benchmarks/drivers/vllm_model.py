"""vLLM as a driver: its engine in this process, one scheduler step at a time, no prefix cache."""

from __future__ import annotations

import itertools
import sys
import time
from typing import Any

import torch

from benchmarks.drivers.lines import private_output, serve
from benchmarks.isa import hide_avx512

hide_avx512(torch)  # before vLLM chooses its kernels

import vllm  # type: ignore[import-not-found]  # noqa: E402
from vllm import LLM, SamplingParams  # noqa: E402

CONTEXT_TOKENS = 4096
SPARE_TOKENS = 64
"""So many more tokens are asked for than are measured: sequences that started first must not end before the others."""


class Vllm:
    """One engine; see `benchmarks.drivers` for what its operations mean."""

    def __init__(self, folder: str, mode: str) -> None:
        self._engine: Any = LLM(
            model=folder,
            dtype="float32",
            max_model_len=CONTEXT_TOKENS,
            enforce_eager=mode == "eager",
            enable_prefix_caching=False,
            seed=0,
        ).llm_engine
        self._names = itertools.count()

    def prefill(self, prompt: list[int]) -> float:
        """Seconds until the first token of one prompt."""
        began = time.perf_counter()
        self._add(prompt, 1)
        while self._engine.has_unfinished_requests():
            self._engine.step()
        return time.perf_counter() - began

    def decode(self, prompts: list[list[int]], steps: int) -> list[float]:
        """Seconds of each of `steps` steps of all prompts together, after their prefill."""
        names = [self._add(prompt, steps + SPARE_TOKENS) for prompt in prompts]
        try:
            self._until_started(names)
            return [self._timed_step()[0] for _ in range(steps)]
        finally:
            self._abort(names)

    def mixed(self, prompts: list[list[int]], prompt: list[int]) -> dict[str, Any]:
        """A prompt arrives while others decode: seconds of each step until its first token, and all tokens of them."""
        names = [self._add(running, 4 * SPARE_TOKENS) for running in prompts]
        times, tokens = [], len(prompt)
        try:
            before = self._until_started(names)
            late = self._add(prompt, 2 * SPARE_TOKENS)
            names.append(late)
            lengths = before
            while lengths.get(late, 0) == 0:
                seconds, found = self._timed_step()
                times.append(seconds)
                lengths = {**lengths, **found}
            tokens += sum(lengths[name] - before[name] for name in before)
        finally:
            self._abort(names)
        return {"seconds": times, "tokens": tokens}

    def greedy(self, prompt: list[int], count: int) -> list[int]:
        """The tokens that follow a prompt."""
        self._add(prompt, count)
        found: list[int] = []
        while self._engine.has_unfinished_requests():
            for output in self._engine.step():
                found = list(output.outputs[0].token_ids)
        return found

    def _add(self, prompt: list[int], count: int) -> str:
        name = f"r{next(self._names)}"
        settings = SamplingParams(temperature=0.0, max_tokens=count, ignore_eos=True, detokenize=False)
        self._engine.add_request(name, {"prompt_token_ids": prompt}, settings)
        return name

    def _timed_step(self) -> tuple[float, dict[str, int]]:
        """Seconds of a step, and how many tokens each sequence that moved has by now."""
        began = time.perf_counter()
        outputs = self._engine.step()
        seconds = time.perf_counter() - began
        return seconds, {output.request_id: len(output.outputs[0].token_ids) for output in outputs}

    def _until_started(self, names: list[str]) -> dict[str, int]:
        lengths: dict[str, int] = dict.fromkeys(names, 0)
        while not all(lengths.values()):
            lengths.update(self._timed_step()[1])
        return lengths

    def _abort(self, names: list[str]) -> None:
        self._engine.abort_request(names)
        while self._engine.has_unfinished_requests():
            self._engine.step()


def main() -> None:
    """Serve the model in the folder that the command line names, `eager` or `compiled`."""
    lines = private_output()
    model = Vllm(sys.argv[1], sys.argv[2])
    operations = {name: getattr(model, name) for name in ("prefill", "decode", "mixed", "greedy")}
    serve(str(vllm.__version__), operations, lines)


if __name__ == "__main__":
    main()
