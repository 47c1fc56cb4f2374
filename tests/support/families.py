"""Tiny models with random weights, made by transformers: one for each family that we run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers

from tests.support.tiny_llama import VOCAB_SIZE, write_byte_tokenizer

SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "eos_token_id": 258,
    "bos_token_id": None,
    "pad_token_id": None,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
FAMILIES = {
    "llama": transformers.LlamaConfig(**SHAPE),
    "llama-tied": transformers.LlamaConfig(**SHAPE, tie_word_embeddings=True),
    "llama3-rope": transformers.LlamaConfig(**SHAPE, rope_parameters=LLAMA3),
    "linear-rope": transformers.LlamaConfig(
        **SHAPE, rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}
    ),
    "mistral": transformers.MistralConfig(**SHAPE, head_dim=16, sliding_window=None),
    "mistral-window": transformers.MistralConfig(**SHAPE, head_dim=8, sliding_window=96),
    "qwen2": transformers.Qwen2Config(**SHAPE),
    "qwen3": transformers.Qwen3Config(**SHAPE, head_dim=24),
}


def write_reference(config: Any, folder: Path) -> Any:
    """Write a model of this shape as a folder, and return it."""
    torch.manual_seed(7)
    auto: Any = transformers.AutoModelForCausalLM
    model = auto.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # norms and biases too, else a forgotten one would not show
            parameter.add_(torch.randn_like(parameter) * 0.15)
    model.save_pretrained(folder)
    write_byte_tokenizer(folder)
    return model
