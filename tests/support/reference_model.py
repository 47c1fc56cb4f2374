"""The packaged model in transformers, built from the GGUF file by other code than ours: the reference of promise 9."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import transformers
from gguf import GGUFReader
from gguf.quants import dequantize
from transformers.initialization import no_init_weights

_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}


class _Reader(GGUFReader):
    """The package's reader over a plain array: slices of a `memmap` cost it seconds for a vocabulary."""

    def _get(self, *args: Any, **kwargs: Any) -> Any:
        if isinstance(self.data, np.memmap):
            self.data = cast(Any, self.data.view(np.ndarray))
        return super()._get(*args, **kwargs)


def load_reference(path: Path) -> Any:
    """A `LlamaForCausalLM` in fp32 with the weights of a GGUF file of Llama architecture with tied embeddings."""
    reader = _Reader(path)

    def number(key: str) -> Any:
        return reader.fields[f"llama.{key}"].contents()

    heads, kv_heads = number("attention.head_count"), number("attention.head_count_kv")
    config = transformers.LlamaConfig(
        vocab_size=number("vocab_size"),
        hidden_size=number("embedding_length"),
        intermediate_size=number("feed_forward_length"),
        num_hidden_layers=number("block_count"),
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=number("context_length"),
        rms_norm_eps=number("attention.layer_norm_rms_epsilon"),
        rope_parameters={"rope_type": "default", "rope_theta": number("rope.freq_base")},
        tie_word_embeddings=True,
    )
    state = {}
    for tensor in reader.tensors:
        value = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy())
        stem = tensor.name.removesuffix(".weight")
        if stem in _TOP:
            state[f"{_TOP[stem]}.weight"] = value
            continue
        _, layer, part = stem.split(".")
        if part in ("attn_q", "attn_k"):
            value = _unpermute(value, heads if part == "attn_q" else kv_heads)
        state[f"model.layers.{layer}.{_NAMES[part]}.weight"] = value
    with no_init_weights():
        model: Any = transformers.LlamaForCausalLM(config)
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected
    assert set(missing) <= {"lm_head.weight"}
    model.tie_weights()
    return model.eval()


def _unpermute(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Undo the reordering that llama.cpp's converter applies to Llama's query and key projections."""
    rows, columns = weight.shape
    pairs = weight.view(heads, rows // heads // 2, 2, columns)
    return pairs.transpose(1, 2).reshape(rows, columns)
