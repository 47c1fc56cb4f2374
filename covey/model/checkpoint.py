"""Named fp32 tensors of a model, the same names and the same rotary order from GGUF and from safetensors."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open

from covey.errors import InvalidArgument

from .config import ModelConfig
from .gguf_file import GgufFile
from .source import ModelSource

_GGUF_TOP = {"embed": "token_embd", "final_norm": "output_norm", "lm_head": "output"}
_GGUF_LAYER = {
    "attn_norm": "attn_norm", "q": "attn_q", "k": "attn_k", "v": "attn_v", "o": "attn_output",
    "q_norm": "attn_q_norm", "k_norm": "attn_k_norm", "mlp_norm": "ffn_norm",
    "gate": "ffn_gate", "up": "ffn_up", "down": "ffn_down",
}  # fmt: skip
_HF_TOP = {"embed": "model.embed_tokens", "final_norm": "model.norm", "lm_head": "lm_head"}
_HF_LAYER = {
    "attn_norm": "input_layernorm", "q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj",
    "o": "self_attn.o_proj", "q_norm": "self_attn.q_norm", "k_norm": "self_attn.k_norm",
    "mlp_norm": "post_attention_layernorm", "gate": "mlp.gate_proj", "up": "mlp.up_proj", "down": "mlp.down_proj",
}  # fmt: skip
_LAYER_NAME = re.compile(r"(\d+)\.(\w+)")


class Checkpoint:
    """Reads `embed`, `final_norm`, `lm_head` and `{layer}.{part}`; a `.bias` suffix names a bias.

    Rows of `q`, `k` and their norms come with rotary pairs adjacent (as llama.cpp stores Llama), which lets one
    complex product rotate a head; attention is the same in any common order of the two.
    """

    def __init__(self, source: ModelSource, config: ModelConfig) -> None:
        self._config = config
        self._gguf: GgufFile | None = source.gguf() if source.kind == "gguf" else None
        self._files = {} if self._gguf else _index_safetensors(source.weight_files())

    def read(self, name: str) -> torch.Tensor:
        """One tensor in fp32. Raises InvalidArgument (field `model`) when the checkpoint has none of that name."""
        part, _, suffix = name.partition(":")
        suffix = suffix or "weight"
        tensor = self._read_gguf(part, suffix) if self._gguf else self._read_hf(part, suffix)
        return _pair_rotary(tensor, part.rpartition(".")[2], self._config) if self._needs_pairing(part) else tensor

    def _needs_pairing(self, part: str) -> bool:
        if part.rpartition(".")[2] not in ("q", "k", "q_norm", "k_norm"):
            return False
        return self._gguf is None or self._config.family != "llama"

    def _read_hf(self, part: str, suffix: str) -> torch.Tensor:
        match = _LAYER_NAME.fullmatch(part)
        stem = f"model.layers.{match[1]}.{_HF_LAYER[match[2]]}" if match else _HF_TOP[part]
        name = f"{stem}.{suffix}"
        if name not in self._files:
            raise InvalidArgument(f"the checkpoint has no tensor {name!r}", field="model")
        with safe_open(self._files[name], framework="pt") as file:
            tensor: torch.Tensor = file.get_tensor(name)
        return tensor.to(torch.float32)

    def _read_gguf(self, part: str, suffix: str) -> torch.Tensor:
        # gguf takes half a second to import and only a first start needs it.
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
        from gguf.quants import dequantize

        assert self._gguf is not None
        match = _LAYER_NAME.fullmatch(part)
        stem = f"blk.{match[1]}.{_GGUF_LAYER[match[2]]}" if match else _GGUF_TOP[part]
        found = self._gguf.tensors.get(f"{stem}.{suffix}")
        if found is None:
            raise InvalidArgument(f"the GGUF file has no tensor {stem}.{suffix}", field="model")
        try:
            kind = GGMLQuantizationType(found.kind)
            per_block, block_bytes = GGML_QUANT_SIZES[kind]
            row_bytes = found.shape[-1] // per_block * block_bytes
            raw = np.memmap(
                self._gguf.path, mode="r", dtype=np.uint8, offset=found.offset, shape=(*found.shape[:-1], row_bytes)
            )
            values = dequantize(raw, kind).astype(np.float32, copy=True)
        except (ValueError, KeyError, NotImplementedError) as error:
            raise InvalidArgument(f"cannot dequantise {found.name}: {error}", field="model") from error
        return torch.from_numpy(values.reshape(found.shape))


def _index_safetensors(paths: tuple[Path, ...]) -> dict[str, Path]:
    index: dict[str, Path] = {}
    for path in paths:
        with safe_open(path, framework="pt") as file:
            index.update(dict.fromkeys(file.keys(), path))
    return index


def _pair_rotary(tensor: torch.Tensor, part: str, config: ModelConfig) -> torch.Tensor:
    """Reorder each head's rows from halves (i, i + d/2) to adjacent pairs (2i, 2i + 1)."""
    heads = {"q": config.n_heads, "k": config.n_kv_heads}.get(part, 1)
    rest = tensor.shape[1:]
    halves = tensor.reshape(heads, 2, config.head_dim // 2, *rest)
    return halves.transpose(1, 2).reshape(tensor.shape).contiguous()
