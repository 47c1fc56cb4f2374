"""transformers as a driver: eager SDPA attention, a lean loop over one key-value cache, greedy tokens."""

from __future__ import annotations

import os
import sys
import time
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, DynamicCache

from benchmarks.drivers.lines import private_output, serve


class Transformers:
    """One model; see `benchmarks.drivers` for what its operations mean."""

    def __init__(self, folder: str) -> None:
        torch.set_num_threads(len(os.sched_getaffinity(0)))
        models: Any = AutoModelForCausalLM
        self._model = models.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa").eval()

    def prefill(self, prompt: list[int]) -> float:
        """Seconds until the first token of one prompt."""
        began = time.perf_counter()
        self._next([prompt], DynamicCache())
        return time.perf_counter() - began

    def decode(self, prompts: list[list[int]], steps: int) -> list[float]:
        """Seconds of each of `steps` steps of all prompts together, after their prefill."""
        cache = DynamicCache()
        return self._steps(self._prefilled(prompts, cache), cache, steps)

    def mixed(self, prompts: list[list[int]], prompt: list[int]) -> dict[str, Any]:
        """It cannot mix: the new prompt runs by itself, then every running sequence gets a token."""
        cache = DynamicCache()
        tokens = self._prefilled(prompts, cache)
        times = [self.prefill(prompt), *self._steps(tokens, cache, 1)]
        return {"seconds": times, "tokens": len(prompt) + len(prompts)}

    def greedy(self, prompt: list[int], count: int) -> list[int]:
        """The tokens that follow a prompt."""
        cache = DynamicCache()
        found = [self._next([prompt], cache)]
        while len(found) < count:
            found.append(self._next(found[-1], cache))
        return [int(token[0, 0]) for token in found]

    @torch.inference_mode()
    def _next(self, tokens: list[list[int]] | torch.Tensor, cache: Any) -> torch.Tensor:
        ids = torch.as_tensor(tokens)
        logits = self._model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        best: torch.Tensor = logits[:, -1].argmax(dim=-1, keepdim=True)
        return best

    def _prefilled(self, prompts: list[list[int]], cache: Any) -> torch.Tensor:
        return self._next(prompts, cache)

    def _steps(self, tokens: torch.Tensor, cache: Any, steps: int) -> list[float]:
        times = []
        for _ in range(steps):
            began = time.perf_counter()
            tokens = self._next(tokens, cache)
            times.append(time.perf_counter() - began)
        return times


def main() -> None:
    """Serve the model in the folder that the command line names."""
    lines = private_output()
    model = Transformers(sys.argv[1])
    operations = {name: getattr(model, name) for name in ("prefill", "decode", "mixed", "greedy")}
    serve(str(transformers.__version__), operations, lines)


if __name__ == "__main__":
    main()
