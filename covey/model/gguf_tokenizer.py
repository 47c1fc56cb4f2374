"""A `tokenizers` tokenizer from the vocabulary inside a GGUF file (byte-level BPE models)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from covey.errors import InvalidArgument

_CONTROL, _USER_DEFINED = 3, 4

_QWEN_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LLAMA3_SPLIT = _QWEN_SPLIT.replace(r"\p{N}|", r"\p{N}{1,3}|", 1)


def build(meta: Mapping[str, Any]) -> Tokenizer:
    """Build it from GGUF metadata. Raises InvalidArgument (field `model`) for a vocabulary of another kind."""
    kind, pre = str(meta.get("tokenizer.ggml.model")), str(meta.get("tokenizer.ggml.pre", "default"))
    if kind != "gpt2":
        raise InvalidArgument(
            f"GGUF tokenizer {kind!r} is not supported, only byte-level BPE; use the folder with tokenizer.json",
            field="model",
        )
    names: list[str] = meta["tokenizer.ggml.tokens"]
    merges = [(left, right) for left, _, right in (m.partition(" ") for m in meta.get("tokenizer.ggml.merges", []))]
    try:
        tokenizer = Tokenizer(models.BPE(vocab={name: i for i, name in enumerate(names)}, merges=merges))
    except Exception as error:  # the Rust binding raises bare Exception
        raise InvalidArgument(f"the GGUF vocabulary is broken: {error}", field="model") from error
    tokenizer.pre_tokenizer = _pre_tokenizer(pre)
    if pre == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    types: list[int] = meta.get("tokenizer.ggml.token_type", [])
    added = [
        AddedToken(name, special=kind == _CONTROL, normalized=False)
        for name, kind in zip(names, types, strict=False)
        if kind in (_CONTROL, _USER_DEFINED)
    ]
    tokenizer.add_tokens(added)
    if meta.get("tokenizer.ggml.add_bos_token"):
        bos = int(meta["tokenizer.ggml.bos_token_id"])
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{names[bos]} $A", special_tokens=[(names[bos], bos)]
        )
    return tokenizer


def _pre_tokenizer(pre: str) -> Any:
    if pre == "smollm":
        return pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    if pre in ("gpt-2", "default"):
        return pre_tokenizers.ByteLevel(add_prefix_space=False)
    split = {"qwen2": _QWEN_SPLIT, "llama-bpe": _LLAMA3_SPLIT}.get(pre)
    if split is None:
        raise InvalidArgument(
            f"pre-tokenizer {pre!r} is unknown (smollm, gpt-2, qwen2, llama-bpe); use a folder with tokenizer.json",
            field="model",
        )
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(split), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
