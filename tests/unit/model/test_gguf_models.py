"""A GGUF file gives the logits of the model that it was made from: names, rotary order, biases, quantised types."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers
from gguf.quants import dequantize, quantize
from tokenizers import pre_tokenizers

from covey.model.runner import open_runner
from covey.model.tokenizer import open_tokenizer
from tests.support.families import FAMILIES, SHAPE, write_reference
from tests.support.tiny_llama import EOS_ID, SPECIAL, VOCAB_SIZE

from .driving import log_probabilities, row

QUANTISABLE = {**SHAPE, "hidden_size": 96, "intermediate_size": 128, "num_attention_heads": 6}

_PARTS = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_TOP = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def gguf_name(name: str) -> str:
    stem, _, suffix = name.rpartition(".")
    if stem in _TOP:
        return f"{_TOP[stem]}.{suffix}"
    _, _, layer, part = stem.split(".", 3)
    return f"blk.{layer}.{_PARTS[part]}.{suffix}"


def permute(weight: np.ndarray, heads: int) -> np.ndarray:
    """What llama.cpp's converter does to Llama's query and key projections."""
    halves = weight.reshape(heads, 2, weight.shape[0] // heads // 2, weight.shape[1])
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(weight.shape))


def write_gguf(model: Any, arch: str, path: Path, kind: gguf.GGMLQuantizationType) -> None:
    config = model.config
    writer = gguf.GGUFWriter(path, arch)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    if getattr(config, "head_dim", None):
        writer.add_key_length(config.head_dim)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([*letters, *SPECIAL])
    writer.add_token_types([1] * len(letters) + [3] * len(SPECIAL))
    writer.add_eos_token_id(EOS_ID)
    with torch.no_grad():
        for name, parameter in model.state_dict().items():
            values = parameter.numpy()
            heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(
                name.split(".")[-2]
            )
            if values.ndim == 1:
                writer.add_tensor(gguf_name(name), values)
                continue
            packed = quantize(values, kind)
            parameter.copy_(torch.from_numpy(dequantize(packed, kind).reshape(values.shape).copy()))
            if heads and arch == "llama":
                packed = quantize(permute(parameter.numpy(), heads), kind)
            writer.add_tensor(gguf_name(name), packed, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.golden
@pytest.mark.parametrize(
    ("family", "arch", "kind"),
    [
        ("llama", "llama", gguf.GGMLQuantizationType.F32),
        ("llama-tied", "llama", gguf.GGMLQuantizationType.F16),
        ("llama-32", "llama", gguf.GGMLQuantizationType.Q8_0),
        ("llama-32", "llama", gguf.GGMLQuantizationType.BF16),
        ("qwen2", "qwen2", gguf.GGMLQuantizationType.F32),
        ("qwen3", "qwen3", gguf.GGMLQuantizationType.F32),
    ],
)
def test_logits_equal_the_model_it_was_made_from(
    family: str, arch: str, kind: gguf.GGMLQuantizationType, tmp_path: Path
) -> None:
    config = transformers.LlamaConfig(**QUANTISABLE) if family == "llama-32" else FAMILIES[family]
    model = write_reference(config, tmp_path / "reference")
    path = tmp_path / "model.gguf"
    write_gguf(model, arch, path, kind)
    tokens = [(11 * i * i + i) % 256 for i in range(40)]
    with torch.inference_mode():
        expected = torch.log_softmax(model(torch.tensor([tokens])).logits[0, -1].double(), dim=-1).numpy()
    runner = open_runner(str(path), cache_dir=tmp_path / "cache", n_blocks=8, block_size=8)
    found = log_probabilities(runner, [row(0, tokens, 0, [4, 2, 0, 1, 3])])[0]
    np.testing.assert_allclose(found, expected, atol=2e-4, rtol=0)
    assert runner.info.eos_ids == (EOS_ID,)
    tokenizer = open_tokenizer(str(path))
    assert tokenizer.vocab_size == VOCAB_SIZE
    assert tokenizer.decode(tokenizer.encode("a 12 \u00e9")) == "a 12 \u00e9"
