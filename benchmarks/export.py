"""Writes a model as a Hugging Face folder (fp32 safetensors, config, tokenizer): peers serve the same weights."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from covey.errors import Unavailable
from covey.model import gguf_tokenizer
from covey.model.checkpoint import Checkpoint
from covey.model.config import ModelConfig
from covey.model.source import ModelSource

_ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}


def export(source: ModelSource, cache_dir: Path) -> Path:
    """The folder of a model: its own if it came as one, otherwise one written once beside the cached weights.

    Raises:
        CoveyError: the weights cannot be read, or the folder not written.
    """
    if source.kind == "folder":
        return source.path
    folder = cache_dir / f"{source.name}-{source.revision[:16]}-hf"
    if folder.is_dir():
        return folder
    config = source.config()
    checkpoint = Checkpoint(source, config)
    draft = folder.with_suffix(".partial")
    shutil.rmtree(draft, ignore_errors=True)
    try:
        draft.mkdir(parents=True)
        save_file(tensors(checkpoint, config), draft / "model.safetensors", metadata={"format": "pt"})
        (draft / "config.json").write_text(json.dumps(config_json(config), indent=2))
        _write_tokenizer(source.gguf().meta, draft)
        draft.rename(folder)
    except (OSError, SafetensorError) as error:
        raise Unavailable(f"cannot write the model's folder {draft}: {error}") from error
    return folder


def tensors(checkpoint: Checkpoint, config: ModelConfig) -> dict[str, torch.Tensor]:
    """The checkpoint under Hugging Face's names and in its rotary order; a tied head is left out."""
    names = {"embed": "model.embed_tokens.weight", "final_norm": "model.norm.weight"}
    if not config.tied:
        names["lm_head"] = "lm_head.weight"
    for i in range(config.n_layers):
        names.update({f"{i}.{part}": f"model.layers.{i}.{name}" for part, name in _layer_names(config).items()})
    return {name: _in_halves(checkpoint.read(part), part, config).contiguous() for part, name in names.items()}


def _layer_names(config: ModelConfig) -> dict[str, str]:
    """A layer's parts as `Checkpoint` calls them, and as Hugging Face does."""
    names = {
        "attn_norm": "input_layernorm.weight",
        "q": "self_attn.q_proj.weight",
        "k": "self_attn.k_proj.weight",
        "v": "self_attn.v_proj.weight",
        "o": "self_attn.o_proj.weight",
        "mlp_norm": "post_attention_layernorm.weight",
        "gate": "mlp.gate_proj.weight",
        "up": "mlp.up_proj.weight",
        "down": "mlp.down_proj.weight",
    }
    if config.qkv_bias:
        names |= {f"{part}:bias": f"self_attn.{part}_proj.bias" for part in ("q", "k", "v")}
    if config.qk_norm:
        names |= {f"{part}_norm": f"self_attn.{part}_norm.weight" for part in ("q", "k")}
    return names


def _in_halves(tensor: torch.Tensor, part: str, config: ModelConfig) -> torch.Tensor:
    heads = {"q": config.n_heads, "k": config.n_kv_heads, "q_norm": 1, "k_norm": 1}
    count = heads.get(part.rpartition(".")[2].removesuffix(":bias"))
    return tensor if count is None else _halves(tensor, count)


def _halves(paired: torch.Tensor, heads: int) -> torch.Tensor:
    """Reorder each head's rows from adjacent rotary pairs (2i, 2i + 1), as the runner keeps them, to (i, i + d/2)."""
    pairs = paired.reshape(heads, -1, 2, *paired.shape[1:])
    return pairs.transpose(1, 2).reshape(paired.shape)


def config_json(config: ModelConfig) -> dict[str, Any]:
    """What `covey.model.config.from_hf` reads back as the same shape."""
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": config.rope_theta}
    if config.rope_scaling is not None:
        scaling = asdict(config.rope_scaling)
        rope |= {"rope_type": scaling.pop("kind"), "original_max_position_embeddings": scaling.pop("original_context")}
        rope |= scaling
    eos = list(config.eos_ids)
    return {
        "architectures": [_ARCHITECTURES[config.family]],
        "model_type": config.family,
        "hidden_act": "silu",
        "hidden_size": config.hidden,
        "intermediate_size": config.intermediate,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.n_kv_heads,
        "head_dim": config.head_dim,
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.context_limit,
        "rms_norm_eps": config.rms_eps,
        # Both spellings: transformers 5 reads the first, what is older the second.
        "rope_parameters": rope,
        "rope_theta": config.rope_theta,
        "tie_word_embeddings": config.tied,
        "attention_bias": config.qkv_bias,
        "eos_token_id": eos[0] if len(eos) == 1 else eos,
        "torch_dtype": "float32",
    }


def _write_tokenizer(meta: dict[str, Any], folder: Path) -> None:
    gguf_tokenizer.build(meta).save(str(folder / "tokenizer.json"))
    names = meta["tokenizer.ggml.tokens"]
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    for name, key in (("bos_token", "bos"), ("eos_token", "eos"), ("pad_token", "padding")):
        if f"tokenizer.ggml.{key}_token_id" in meta:
            settings[name] = names[meta[f"tokenizer.ggml.{key}_token_id"]]
    if meta.get("tokenizer.chat_template"):
        settings["chat_template"] = meta["tokenizer.chat_template"]
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2))
