"""Writes a tiny random Llama with a byte tokenizer as a model folder: fast, deterministic, loaded like any real one."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
EOS_ID = 258
VOCAB_SIZE = 259

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def write_tiny_llama(
    folder: Path,
    *,
    seed: int = 0,
    hidden: int = 64,
    n_layers: int = 2,
    n_heads: int = 4,
    n_kv_heads: int = 2,
    context: int = 2048,
) -> Path:
    """Write config.json, model.safetensors, tokenizer.json and tokenizer_config.json into `folder`; return it."""
    folder.mkdir(parents=True, exist_ok=True)
    shape = {
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_hidden_layers": n_layers,
        "num_attention_heads": n_heads,
        "num_key_value_heads": n_kv_heads,
    }
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "vocab_size": VOCAB_SIZE,
        "max_position_embeddings": context,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": EOS_ID,
        "torch_dtype": "float32",
        **shape,
    }
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    save_file(_weights(seed, shape), folder / "model.safetensors", metadata={"format": "pt"})
    write_byte_tokenizer(folder)
    return folder


def write_byte_tokenizer(folder: Path) -> None:
    """Write a tokenizer of one token a byte and three special ones, with a chat template."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={name: i for i, name in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in SPECIAL])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"eos_token": SPECIAL[2], "chat_template": CHAT_TEMPLATE, "tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=1))


def _weights(seed: int, shape: dict[str, int]) -> dict[str, torch.Tensor]:
    source = torch.Generator().manual_seed(seed)
    hidden, wide = shape["hidden_size"], shape["intermediate_size"]
    kv = hidden // shape["num_attention_heads"] * shape["num_key_value_heads"]

    def matrix(rows: int, columns: int) -> torch.Tensor:
        # Three times the usual scale: the next token then depends visibly on the whole context.
        return torch.randn(rows, columns, generator=source).mul_(3.0 * columns**-0.5)

    weights = {
        "model.embed_tokens.weight": torch.randn(VOCAB_SIZE, hidden, generator=source),
        "model.norm.weight": torch.ones(hidden),
    }
    for i in range(shape["num_hidden_layers"]):
        sizes = {
            "self_attn.q_proj": (hidden, hidden),
            "self_attn.k_proj": (kv, hidden),
            "self_attn.v_proj": (kv, hidden),
            "self_attn.o_proj": (hidden, hidden),
            "mlp.gate_proj": (wide, hidden),
            "mlp.up_proj": (wide, hidden),
            "mlp.down_proj": (hidden, wide),
        }
        for name, (rows, columns) in sizes.items():
            weights[f"model.layers.{i}.{name}.weight"] = matrix(rows, columns)
        for name in ("input_layernorm", "post_attention_layernorm"):
            weights[f"model.layers.{i}.{name}.weight"] = torch.ones(hidden)
    return weights
