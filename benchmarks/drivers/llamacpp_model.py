"""llama.cpp as a driver: its prebuilt library of the npm registry by ctypes, with the fastest code for this processor.

Like `llama-bench` it is timed without sampling, which favours it. The structures are those of the release that
`benchmarks.peers` pins; what is read from them at start must be that release's defaults.
"""

from __future__ import annotations

import ctypes
import os
import sys
import time
from ctypes import POINTER, Structure, byref, c_bool, c_char_p, c_int8, c_int32, c_uint8, c_uint32, c_void_p
from pathlib import Path
from typing import Any

from benchmarks.drivers.lines import private_output, serve

BATCH_TOKENS = 2048
CONTEXT_ROUND = 256


class ModelParams(Structure):
    """Taken as it comes: only its defaults are used, so that its size is enough (some spare bytes do no harm)."""

    _fields_ = (("words", c_int32 * 64),)


class ContextParams(Structure):
    """The first fields of `llama_context_params`; the rest keeps its defaults."""

    _fields_ = (
        ("n_ctx", c_uint32),
        ("n_batch", c_uint32),
        ("n_ubatch", c_uint32),
        ("n_seq_max", c_uint32),
        ("n_rs_seq", c_uint32),
        ("n_outputs_max", c_uint32),
        ("n_outputs_max_per_seq", c_uint32),
        ("n_threads", c_int32),
        ("n_threads_batch", c_int32),
        ("rest", c_int32 * 64),
    )


class BatchTokens(Structure):
    """`llama_batch`."""

    _fields_ = (
        ("n_tokens", c_int32),
        ("token", POINTER(c_int32)),
        ("embd", c_void_p),
        ("pos", POINTER(c_int32)),
        ("n_seq_id", POINTER(c_int32)),
        ("seq_id", POINTER(POINTER(c_int32))),
        ("logits", POINTER(c_int8)),
    )


class PoolParams(Structure):
    """`ggml_threadpool_params`."""

    _fields_ = (
        ("cpumask", c_bool * 512),
        ("n_threads", c_int32),
        ("priority", c_int32),
        ("poll", c_uint32),
        ("flags", c_uint8 * 16),
    )


def libraries(folder: Path) -> tuple[Any, Any, Any]:
    """llama, ggml's base, and the variant of its CPU code that it chose for this machine."""
    base = ctypes.CDLL(str(folder / "libggml-base.so"), mode=ctypes.RTLD_GLOBAL)
    ggml = ctypes.CDLL(str(next(folder.glob("libggml.v*.so"))), mode=ctypes.RTLD_GLOBAL)
    llama = ctypes.CDLL(str(next(folder.glob("libllama.v*.so"))))
    ggml.ggml_backend_load_all_from_path(c_char_p(os.fsencode(folder)))
    maps = Path("/proc/self/maps").read_text().splitlines()
    chosen = next(line.split()[-1] for line in maps if "libggml-cpu-" in line)
    for library, name, result in (
        (llama, "llama_model_default_params", ModelParams),
        (llama, "llama_model_load_from_file", c_void_p),
        (llama, "llama_context_default_params", ContextParams),
        (llama, "llama_init_from_model", c_void_p),
        (llama, "llama_get_memory", c_void_p),
        (llama, "llama_batch_init", BatchTokens),
        (llama, "llama_sampler_init_greedy", c_void_p),
        (base, "ggml_threadpool_params_default", PoolParams),
    ):
        getattr(library, name).restype = result
    return llama, base, ctypes.CDLL(chosen)


class LlamaCpp:
    """One model; see `benchmarks.drivers` for what its operations mean."""

    def __init__(self, folder: Path, model: Path) -> None:
        self._llama, self._base, self._cpu = libraries(folder)
        self._llama.llama_backend_init()
        self._threads = len(os.sched_getaffinity(0))
        loaded = self._llama.llama_model_load_from_file(
            c_char_p(os.fsencode(model)), self._llama.llama_model_default_params()
        )
        if not loaded:
            raise RuntimeError(f"llama.cpp does not load {model}")
        self._model = c_void_p(loaded)
        self._batch = self._llama.llama_batch_init(c_int32(2 * BATCH_TOKENS), c_int32(0), c_int32(1))
        self._pool = self._new_pool()
        self._sampler = c_void_p(self._llama.llama_sampler_init_greedy())
        self._contexts: dict[tuple[int, int], Any] = {}

    def prefill(self, prompt: list[int]) -> float:
        """Seconds until the logits after one prompt are there."""
        context = self._context(1, len(prompt))
        began = time.perf_counter()
        self._run(context, [(token, i, 0) for i, token in enumerate(prompt)], wanted={len(prompt) - 1})
        return time.perf_counter() - began

    def decode(self, prompts: list[list[int]], steps: int) -> list[float]:
        """Seconds of each of `steps` steps of all prompts together, after their prefill."""
        context = self._prefilled(prompts, len(prompts[0]) + steps)
        return [self._step(context, prompts, ahead) for ahead in range(steps)]

    def mixed(self, prompts: list[list[int]], prompt: list[int]) -> dict[str, Any]:
        """One call of everything: a new prompt beside a token of each running sequence."""
        context = self._prefilled([*prompts, prompt[:1]], len(prompt) + len(prompts[0]))
        new = len(prompts)
        self._llama.llama_memory_seq_rm(self._memory(context), c_int32(new), c_int32(-1), c_int32(-1))
        began = time.perf_counter()
        items = [(prompt[0], len(running), seq) for seq, running in enumerate(prompts)]
        items += [(token, i, new) for i, token in enumerate(prompt)]
        self._run(context, items, wanted={*range(new), len(items) - 1})
        return {"seconds": [time.perf_counter() - began], "tokens": len(items)}

    def greedy(self, prompt: list[int], count: int) -> list[int]:
        """The tokens that follow a prompt."""
        context = self._prefilled([prompt], len(prompt) + count)
        found: list[int] = []
        while True:
            found.append(int(self._llama.llama_sampler_sample(self._sampler, context, c_int32(-1))))
            if len(found) == count:
                return found
            self._run(context, [(found[-1], len(prompt) + len(found) - 1, 0)], wanted={0})

    def _new_pool(self) -> Any:
        """Threads that stay, as its own programs have them; without, every call would start new ones."""
        params = self._base.ggml_threadpool_params_default(c_int32(self._threads))
        self._cpu.ggml_threadpool_new.restype = c_void_p
        return c_void_p(self._cpu.ggml_threadpool_new(byref(params)))

    def _context(self, sequences: int, tokens: int) -> Any:
        """An empty context for so many sequences of so many tokens each."""
        size = -(-tokens // CONTEXT_ROUND) * CONTEXT_ROUND
        if (sequences, size) not in self._contexts:
            params = self._llama.llama_context_default_params()
            if (params.n_batch, params.n_ubatch, params.n_seq_max) != (2048, 512, 1):
                raise RuntimeError("this llama.cpp has another layout of llama_context_params")
            params.n_ctx, params.n_batch, params.n_seq_max = sequences * size, BATCH_TOKENS, sequences
            params.n_threads = params.n_threads_batch = self._threads
            made = self._llama.llama_init_from_model(self._model, params)
            if not made:
                raise RuntimeError("llama.cpp makes no context")
            self._contexts[sequences, size] = c_void_p(made)
            self._llama.llama_attach_threadpool(self._contexts[sequences, size], self._pool, self._pool)
        context = self._contexts[sequences, size]
        self._llama.llama_memory_clear(self._memory(context), c_bool(True))
        return context

    def _memory(self, context: Any) -> Any:
        return c_void_p(self._llama.llama_get_memory(context))

    def _prefilled(self, prompts: list[list[int]], tokens: int) -> Any:
        context = self._context(len(prompts), tokens)
        for seq, prompt in enumerate(prompts):
            items = [(token, i, seq) for i, token in enumerate(prompt)]
            self._run(context, items, wanted={len(items) - 1})
        return context

    def _step(self, context: Any, prompts: list[list[int]], ahead: int) -> float:
        began = time.perf_counter()
        items = [(prompt[ahead % len(prompt)], len(prompt) + ahead, seq) for seq, prompt in enumerate(prompts)]
        self._run(context, items, wanted=set(range(len(items))))
        return time.perf_counter() - began

    def _run(self, context: Any, items: list[tuple[int, int, int]], wanted: set[int]) -> None:
        """Compute (token, position, sequence) items together, with logits for the indices in `wanted`."""
        batch = self._batch
        batch.n_tokens = len(items)
        for i, (token, position, seq) in enumerate(items):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = token, position, 1, i in wanted
            batch.seq_id[i][0] = seq
        failed = self._llama.llama_decode(context, batch)
        self._llama.llama_synchronize(context)
        if failed:
            raise RuntimeError(f"llama_decode returned {failed}")


def main() -> None:
    """Serve the GGUF file that the command line names, with the libraries in the folder named first."""
    lines = private_output()
    model = LlamaCpp(Path(sys.argv[1]), Path(sys.argv[2]))
    operations = {name: getattr(model, name) for name in ("prefill", "decode", "mixed", "greedy")}
    serve(sys.argv[3], operations, lines)


if __name__ == "__main__":
    main()
