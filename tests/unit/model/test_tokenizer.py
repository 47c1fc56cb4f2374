"""The tokenizer from a GGUF file equals the published one's rules, and reading it needs neither torch nor a second."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as RawTokenizer

from covey.errors import InvalidArgument
from covey.model.tokenizer import Tokenizer, open_tokenizer
from tests.support.tiny_llama import EOS_ID, VOCAB_SIZE

HELLO = [{"role": "user", "content": "Hello"}]


@pytest.fixture(scope="module")
def smol() -> Tokenizer:
    return open_tokenizer("smollm2")


def test_known_encodings(smol: Tokenizer) -> None:
    # As the model's published tokenizer.json gives them: digits stand alone, spaces lead words.
    assert smol.encode("Hello world") == [19556, 905]
    assert smol.encode("2024") == [34, 32, 34, 36]
    assert smol.encode("<|im_start|>user\nHi<|im_end|>") == [1, 4093, 198, 26843, 2]
    assert smol.eos_ids == (2,)
    assert smol.context_limit == 8192


def test_the_chat_template_renders_the_default_system_message(smol: Tokenizer) -> None:
    assert smol.apply_chat_template(HELLO) == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"
    )
    assert smol.apply_chat_template(HELLO, add_generation_prompt=False).endswith("Hello<|im_end|>\n")
    assert smol.encode_chat(HELLO) == smol.encode(smol.apply_chat_template(HELLO))


def test_the_template_is_that_of_transformers(smol: Tokenizer, tiny_folder: Path) -> None:
    import transformers

    theirs = transformers.AutoTokenizer.from_pretrained(tiny_folder)
    messages = [{"role": "system", "content": "Be brief."}, *HELLO, {"role": "assistant", "content": " Hi!\n"}]
    expected = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert open_tokenizer(str(tiny_folder)).encode_chat(messages) == list(expected)


def test_merges_and_pre_tokenizer_are_those_of_transformers(smol: Tokenizer) -> None:
    """The slow way through transformers reads the same file; it knows no digit splitting, so the text has no digits."""
    import transformers

    from covey.model.source import resolve

    path = resolve("smollm2").path
    theirs = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    for text in (
        "The quick brown fox, it's here!\n\n\tdef f(x):\n    return x",
        "na\u00efve caf\u00e9 \u65e5\u672c\u8a9e \U0001f642",
        "  two  spaces ",
    ):
        assert smol.encode(text) == theirs.encode(text, add_special_tokens=False)


def test_tools_without_a_place_are_refused_by_name(smol: Tokenizer) -> None:
    assert not smol.supports_tools
    with pytest.raises(InvalidArgument) as caught:
        smol.apply_chat_template(HELLO, tools=[{"type": "function", "function": {"name": "f"}}])
    assert caught.value.field == "tools"


@pytest.mark.parametrize("messages", [[{"role": "user", "content": 3}], [{"role": "user"}], ["text"]])
def test_messages_that_the_template_refuses(smol: Tokenizer, messages: list[object]) -> None:
    with pytest.raises(InvalidArgument) as caught:
        smol.apply_chat_template(messages)  # type: ignore[arg-type]
    assert caught.value.field == "messages"


def test_a_template_cannot_reach_out_of_its_sandbox() -> None:
    from covey.model.chat_template import ChatTemplate

    template = ChatTemplate("{{ messages.__class__.__mro__[1].__subclasses__() }}", special_tokens={})
    with pytest.raises(InvalidArgument):
        template.render(HELLO)
    assert (
        ChatTemplate("{{ messages | tojson }}", special_tokens={}).render([{"a": "<\u00e9>"}]) == '[{"a": "<\u00e9>"}]'
    )
    with pytest.raises(InvalidArgument, match="broken"):
        ChatTemplate("{% if %}", special_tokens={})


# The vocabulary has no token for a few control characters, nor for the first byte of the planes above U+3FFFF.
@given(st.text(st.characters(max_codepoint=0x3FFFF, exclude_categories=("Cs", "Cc"), include_characters="\n\t")))
@settings(max_examples=150)
def test_text_survives_encoding(smol: Tokenizer, text: str) -> None:
    assert smol.decode(smol.encode(text), skip_special=False) == text


@given(st.lists(st.integers(0, 49151), max_size=40), st.integers(1, 5))
@settings(max_examples=200)
def test_a_stream_equals_decoding_at_once(smol: Tokenizer, tokens: list[int], step: int) -> None:
    stream = smol.text_stream()
    pieces = [stream.push(tokens[i : i + step]) for i in range(0, len(tokens), step)]
    assert "".join([*pieces, stream.flush()]) == smol.decode(tokens)


def test_a_character_is_never_halved(smol: Tokenizer) -> None:
    stream = smol.text_stream()
    ids = smol.encode("\U0001f642\u00e9")
    pieces = [stream.push([i]) for i in ids]
    assert len(ids) > 2
    assert "\ufffd" not in "".join(pieces)
    assert "".join(pieces) == "\U0001f642\u00e9"


def test_a_sentencepiece_vocabulary_streams_too() -> None:
    from tokenizers import decoders, models

    vocab = {"<unk>": 0, "\u2581Hi": 1, "<0xC3>": 2, "<0xA9>": 3, "\u2581you": 4}
    raw = RawTokenizer(models.BPE(vocab=vocab, merges=[], byte_fallback=True, unk_token="<unk>"))
    raw.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer = Tokenizer(raw, template=None, eos_ids=(), context_limit=8)
    stream = tokenizer.text_stream()
    assert [stream.push([i]) for i in (1, 2, 3, 4)] == ["Hi", "", "\u00e9", " you"]
    assert tokenizer.decode([1, 2, 3, 4]) == "Hi\u00e9 you"
    assert not tokenizer.supports_chat
    with pytest.raises(InvalidArgument, match="no chat template"):
        tokenizer.apply_chat_template(HELLO)


def test_the_tiny_folder_has_a_byte_tokenizer(tiny_folder: Path) -> None:
    tokenizer = open_tokenizer(str(tiny_folder))
    assert tokenizer.vocab_size == VOCAB_SIZE
    assert tokenizer.eos_ids == (EOS_ID,)
    assert len(tokenizer.encode("h\u00e9")) == 3
    assert tokenizer.hash != open_tokenizer("smollm2").hash


def test_opening_needs_no_torch_and_less_than_a_second() -> None:
    code = (
        "import sys, time; from covey.model.tokenizer import open_tokenizer;import covey.model.plan, covey.model.share;"
        "t = time.process_time(); open_tokenizer('smollm2'); print(time.process_time() - t, 'torch' in sys.modules)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert float(out[0]) < 1.0
    assert out[1] == "False"
