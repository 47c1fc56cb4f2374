"""Compiles every kernel, as its launcher calls it, to machine code for NVIDIA GPUs; needs none. A process of its own.

Takes a compute capability, such as 90; prints `kernel shared-memory-bytes` a line.
"""

from __future__ import annotations

import os
import sys
from typing import Any

os.environ["TRITON_DEFAULT_FP_FUSION"] = "1"

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

NAMES = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int8: "*i8",
    torch.int32: "*i32",
    torch.int64: "*i64",
}
CAPABILITY = int(sys.argv[1])


def compile_instead(self: Any, *args: Any, grid: Any, warmup: bool = False, **kwargs: Any) -> None:
    """Stands in for a launch."""
    values = dict(zip(self.arg_names, args, strict=False)) | kwargs
    signature, constants = {}, {}
    for parameter in self.params:
        value = values[parameter.name]
        if parameter.is_constexpr:
            signature[parameter.name] = "constexpr"
            constants[parameter.name] = value
        elif isinstance(value, torch.Tensor):
            signature[parameter.name] = NAMES[value.dtype]
        else:
            signature[parameter.name] = "fp32" if isinstance(value, float) else "i32"
    source = ASTSource(fn=self, signature=signature, constexprs=constants)
    compiled = triton.compile(source, target=GPUTarget("cuda", CAPABILITY, 32))
    assert compiled.asm["cubin"]
    print(self.__name__, compiled.metadata.shared)


def launch_everything() -> None:
    """Every launcher, with the shapes of a 1B model, over every KV type."""
    from covey.model.gpu.kernels.decode_attention import decode_attention
    from covey.model.gpu.kernels.gather import gather
    from covey.model.gpu.kernels.norm import add_rms_norm
    from covey.model.gpu.kernels.prefill_attention import Chunks, prefill_attention
    from covey.model.gpu.kernels.quantise import dequantise, quantise
    from covey.model.gpu.kernels.rotary import rotate_heads
    from covey.model.gpu.kernels.sampling import DrawSettings, draw_tokens
    from covey.model.gpu.kernels.scatter import scatter
    from covey.model.gpu.pages import DevicePool
    from covey.model.pool import Geometry, KvDtype

    ids = torch.zeros(2, dtype=torch.int32)
    table = torch.zeros(2, 2, dtype=torch.int32)
    kinds: tuple[tuple[torch.dtype, KvDtype], ...] = (
        (torch.float32, "fp32"),
        (torch.bfloat16, "fp16"),
        (torch.bfloat16, "int8"),
    )
    for dtype, kv_dtype in kinds:
        qkv, out = torch.zeros(2, 48 * 64, dtype=dtype), torch.zeros(2, 32, 64, dtype=dtype)
        geometry = Geometry(n_layers=2, kv_heads=8, head_dim=64, block_size=32, kv_dtype=kv_dtype)
        pool = DevicePool(geometry, 2, torch.device("cpu"))
        scatter(qkv[:, 32 * 64 :], ids, pool, 0)
        gather(pool, 0, ids, 40, dtype)
        decode_attention(qkv, pool, 0, table, ids, out, 2)
        prefill_attention(qkv, pool, 0, Chunks(firsts=ids, lengths=ids, starts=ids, tables=table, tiles=table), out)
    for dtype in (torch.float32, torch.bfloat16):
        qkv, hidden = torch.zeros(2, 48 * 64, dtype=dtype), torch.zeros(2, 2048)
        norms = (torch.zeros(64), torch.zeros(64))
        phases = torch.zeros(2, 32)
        for weights in (None, norms):
            rotate_heads(qkv, phases, phases, 32, 8, weights, 1e-5)
        for delta in (None, hidden.to(dtype)):
            add_rms_norm(hidden, delta, torch.zeros(2048), 1e-5, dtype)
        dequantise(*quantise(hidden.to(dtype)), dtype)
    numbers = torch.zeros(2)
    draw_tokens(
        torch.zeros(2, 128256),
        DrawSettings(
            temperature=numbers,
            top_k=ids,
            top_p=numbers,
            min_p=numbers,
            uniform=numbers,
            mask_row=ids,
            masks=torch.zeros(1, 4008, dtype=torch.int32),
        ),
    )


if __name__ == "__main__":
    JITFunction.run = compile_instead
    launch_everything()
    sys.exit(0)
