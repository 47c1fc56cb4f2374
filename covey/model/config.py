"""The shape of a model, read from a `config.json` or from GGUF metadata."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from covey.errors import InvalidArgument

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeScaling:
    """A stretched rotary embedding: `linear`, or `llama3` with its two wavelengths."""

    kind: str
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_context: int = 8192


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """A decoder of the Llama family. Qwen2 is `qkv_bias`, Qwen3 is `qk_norm`.

    `context_limit` is in tokens and never above the sliding window, so that full attention is exact.
    """

    family: str
    hidden: int
    intermediate: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    vocab_size: int
    rms_eps: float
    rope_theta: float
    rope_scaling: RopeScaling | None
    context_limit: int
    tied: bool
    qkv_bias: bool
    qk_norm: bool
    eos_ids: tuple[int, ...]


def from_hf(config: Mapping[str, Any], generation: Mapping[str, Any]) -> ModelConfig:
    """Read a Hugging Face `config.json` and `generation_config.json`.

    Raises InvalidArgument (field `model`) for a family or a feature that the runner does not compute exactly.
    """
    family = str(config.get("model_type", ""))
    if family not in FAMILIES:
        raise _unsupported(f"model_type {family!r} is not one of {', '.join(FAMILIES)}")
    if config.get("hidden_act", "silu") != "silu":
        raise _unsupported(f"hidden_act {config['hidden_act']!r} is not silu")
    if config.get("mlp_bias") or (config.get("attention_bias") and family != "qwen2"):
        raise _unsupported("biases are supported for Qwen2 only")
    try:
        return _build_hf(family, config, generation)
    except (KeyError, TypeError, ValueError) as error:
        raise _unsupported(f"config.json is incomplete or malformed: {error!r}") from error


def _build_hf(family: str, config: Mapping[str, Any], generation: Mapping[str, Any]) -> ModelConfig:
    heads, hidden = int(config["num_attention_heads"]), int(config["hidden_size"])
    context = int(config["max_position_embeddings"])
    windowed = config.get("use_sliding_window", family == "mistral")
    window = config.get("sliding_window") if windowed else None
    theta, scaling = _rope_hf(config)
    eos = generation.get("eos_token_id", config.get("eos_token_id"))
    return ModelConfig(
        family=family,
        hidden=hidden,
        intermediate=int(config["intermediate_size"]),
        n_layers=int(config["num_hidden_layers"]),
        n_heads=heads,
        n_kv_heads=int(config.get("num_key_value_heads") or heads),
        head_dim=int(config.get("head_dim") or hidden // heads),
        vocab_size=int(config["vocab_size"]),
        rms_eps=float(config.get("rms_norm_eps", 1e-6)),
        rope_theta=theta,
        rope_scaling=scaling,
        context_limit=min(context, int(window)) if window else context,
        tied=bool(config.get("tie_word_embeddings", False)),
        qkv_bias=family == "qwen2",
        qk_norm=family == "qwen3",
        eos_ids=_ids(eos),
    )


def _ids(value: object) -> tuple[int, ...]:
    if value is None:
        return ()
    return tuple(int(v) for v in value) if isinstance(value, list) else (int(str(value)),)


def _rope_hf(config: Mapping[str, Any]) -> tuple[float, RopeScaling | None]:
    # transformers 5 writes `rope_parameters`; older files have `rope_theta` and `rope_scaling`.
    rope: Mapping[str, Any] = config.get("rope_parameters") or config.get("rope_scaling") or {}
    theta = float(rope.get("rope_theta", config.get("rope_theta", 10000.0)))
    kind = str(rope.get("rope_type", rope.get("type", "default")))
    if kind == "default":
        return theta, None
    if kind not in ("linear", "llama3"):
        raise _unsupported(f"rope type {kind!r} is not one of default, linear, llama3")
    return theta, RopeScaling(
        kind=kind,
        factor=float(rope["factor"]),
        low_freq_factor=float(rope.get("low_freq_factor", 1.0)),
        high_freq_factor=float(rope.get("high_freq_factor", 4.0)),
        original_context=int(rope.get("original_max_position_embeddings", config["max_position_embeddings"])),
    )


def from_gguf(meta: Mapping[str, Any], tensor_names: frozenset[str]) -> ModelConfig:
    """Read GGUF metadata. Mistral files say `llama`. Raises InvalidArgument (field `model`) as `from_hf` does."""
    arch = str(meta.get("general.architecture", ""))
    if arch not in ("llama", "qwen2", "qwen3"):
        raise _unsupported(f"GGUF architecture {arch!r} is not one of llama, qwen2, qwen3")
    if "rope_freqs.weight" in tensor_names or meta.get(f"{arch}.rope.scaling.type", "none") not in ("none", "linear"):
        raise _unsupported("GGUF files with stretched rotary embeddings are not supported; use the safetensors folder")
    try:
        return _build_gguf(arch, meta, tensor_names)
    except (KeyError, TypeError, ValueError) as error:
        raise _unsupported(f"GGUF metadata is incomplete or malformed: {error!r}") from error


def _build_gguf(arch: str, meta: Mapping[str, Any], tensor_names: frozenset[str]) -> ModelConfig:
    heads, hidden = int(meta[f"{arch}.attention.head_count"]), int(meta[f"{arch}.embedding_length"])
    factor = float(meta.get(f"{arch}.rope.scaling.factor", 1.0))
    eos = [meta[k] for k in ("tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id") if k in meta]
    return ModelConfig(
        family=arch,
        hidden=hidden,
        intermediate=int(meta[f"{arch}.feed_forward_length"]),
        n_layers=int(meta[f"{arch}.block_count"]),
        n_heads=heads,
        n_kv_heads=int(meta.get(f"{arch}.attention.head_count_kv", heads)),
        head_dim=int(meta.get(f"{arch}.attention.key_length", hidden // heads)),
        vocab_size=len(meta["tokenizer.ggml.tokens"]),
        rms_eps=float(meta[f"{arch}.attention.layer_norm_rms_epsilon"]),
        rope_theta=float(meta.get(f"{arch}.rope.freq_base", 10000.0)),
        rope_scaling=RopeScaling(kind="linear", factor=factor) if factor != 1.0 else None,
        context_limit=int(meta[f"{arch}.context_length"]),
        tied="output.weight" not in tensor_names,
        qkv_bias="blk.0.attn_q.bias" in tensor_names,
        qk_norm="blk.0.attn_q_norm.weight" in tensor_names,
        eos_ids=tuple(dict.fromkeys(int(i) for i in eos)),
    )


def _unsupported(reason: str) -> InvalidArgument:
    return InvalidArgument(f"this model cannot be served: {reason}", field="model")
