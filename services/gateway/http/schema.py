"""The JSON that clients send: OpenAI's fields that are supported, and Covey's extras. Anything else is refused."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

Tokens = Annotated[int, Meta(ge=1, le=1_048_576)]
Temperature = Annotated[float, Meta(ge=0, le=2)]
Share = Annotated[float, Meta(ge=0, le=1)]
Penalty = Annotated[float, Meta(ge=-2, le=2)]
Natural = Annotated[int, Meta(ge=0, le=2**31 - 1)]
Seed = Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)]
StopText = Annotated[str, Meta(min_length=1, max_length=256)]
Text = Annotated[str, Meta(max_length=4_194_304)]
ModelName = Annotated[str, Meta(min_length=1, max_length=256)]
FunctionName = Annotated[str, Meta(min_length=1, max_length=64, pattern="^[a-zA-Z0-9_-]+$")]
Bias = Annotated[float, Meta(ge=-100, le=100)]


class _Strict(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A JSON object whose unknown fields are errors."""


class TextPart(_Strict, frozen=True, kw_only=True):
    text: Text
    type: Literal["text"] = "text"


class CalledFunction(_Strict, frozen=True, kw_only=True):
    name: FunctionName
    arguments: Text


class ToolCallPart(_Strict, frozen=True, kw_only=True):
    id: Annotated[str, Meta(max_length=256)]
    function: CalledFunction
    type: Literal["function"] = "function"
    index: int | None = None


class ChatMessage(_Strict, frozen=True, kw_only=True):
    """One turn. `content` may be left out of an assistant's turn that has `tool_calls`."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Text | list[TextPart] | None = None
    tool_calls: Annotated[list[ToolCallPart], Meta(max_length=128)] | None = None
    tool_call_id: Annotated[str, Meta(max_length=256)] | None = None
    refusal: str | None = None


class Function(_Strict, frozen=True, kw_only=True):
    """`strict` has no effect: forced calls always obey the schema, others never must."""

    name: FunctionName
    description: Annotated[str, Meta(max_length=16_384)] = ""
    parameters: dict[str, Any] | None = None
    strict: bool = False


class ToolPart(_Strict, frozen=True, kw_only=True):
    function: Function
    type: Literal["function"] = "function"


class ChosenFunction(_Strict, frozen=True, kw_only=True):
    name: FunctionName


class ChosenTool(_Strict, frozen=True, kw_only=True):
    function: ChosenFunction
    type: Literal["function"] = "function"


class StreamOptions(_Strict, frozen=True, kw_only=True):
    include_usage: bool = False


class JsonSchema(_Strict, frozen=True, kw_only=True):
    """`strict` has no effect: an answer always obeys the schema."""

    name: FunctionName
    schema: dict[str, Any]
    description: Annotated[str, Meta(max_length=16_384)] = ""
    strict: bool = False


class ResponseFormat(_Strict, frozen=True, kw_only=True):
    """OpenAI's kinds, and `regex` and `grammar` (EBNF with a rule `root`) with their text."""

    type: Literal["text", "json_object", "json_schema", "regex", "grammar"]
    json_schema: JsonSchema | None = None
    regex: Annotated[str, Meta(min_length=1, max_length=65_536)] | None = None
    grammar: Annotated[str, Meta(min_length=1, max_length=65_536)] | None = None


class _Generation(_Strict, frozen=True, kw_only=True):
    """What chat and plain completions share."""

    model: ModelName
    stream: bool = False
    stream_options: StreamOptions | None = None
    max_tokens: Tokens | None = None
    temperature: Temperature | None = None
    top_p: Share | None = None
    n: Annotated[int, Meta(ge=1, le=128)] | None = None
    stop: StopText | Annotated[list[StopText], Meta(max_length=16)] | None = None
    seed: Seed | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    logit_bias: Annotated[dict[int, Bias], Meta(max_length=1024)] | None = None
    user: Annotated[str, Meta(max_length=256)] | None = None
    top_k: Natural | None = None
    min_p: Share | None = None
    repetition_penalty: Annotated[float, Meta(ge=0.01, le=100)] | None = None
    min_tokens: Natural | None = None
    ignore_eos: bool = False
    response_format: ResponseFormat | None = None
    return_token_ids: bool = False
    """Each choice also carries the ids of its tokens (vLLM's name for it)."""
    priority: Annotated[int, Meta(ge=-100, le=100)] = 0
    cache: Literal["use", "bypass", "no-store", "no-cache", "refresh"] = "use"
    """As HTTP's `Cache-Control` says it; `bypass` neither reads nor fills, `refresh` is `no-cache`."""
    cache_max_age_s: Annotated[float, Meta(ge=0)] = 0.0
    """The oldest kept answer that will do; 0 is no limit of the request's own."""


class ChatBody(_Generation, frozen=True, kw_only=True):
    """`POST /v1/chat/completions`."""

    messages: Annotated[list[ChatMessage], Meta(min_length=1, max_length=4096)]
    max_completion_tokens: Tokens | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    tools: Annotated[list[ToolPart], Meta(min_length=1, max_length=128)] | None = None
    tool_choice: Literal["none", "auto", "required"] | ChosenTool | None = None
    parallel_tool_calls: bool | None = None


class CompletionBody(_Generation, frozen=True, kw_only=True):
    """`POST /v1/completions`. `prompt` is a text, texts, tokens, or lists of tokens."""

    prompt: Text | list[Text | int | list[int]]
    logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None


class EmbeddingsBody(_Strict, frozen=True, kw_only=True):
    """`POST /v1/embeddings`."""

    model: ModelName
    input: Text | Annotated[list[Text], Meta(min_length=1, max_length=2048)]
    encoding_format: Literal["float", "base64"] = "float"
    user: Annotated[str, Meta(max_length=256)] | None = None


class TokenizeBody(_Strict, frozen=True, kw_only=True):
    """`POST /tokenize`: tokens of a text or of a conversation."""

    model: ModelName
    prompt: Text | None = None
    messages: list[ChatMessage] | None = None
    add_special_tokens: bool = True


NOT_YET = frozenset(
    {
        "audio", "best_of", "dimensions", "echo", "function_call", "functions", "guided_json", "metadata", "modalities",
        "moderation", "name", "prediction", "prompt_cache_key", "prompt_cache_retention", "reasoning_effort",
        "safety_identifier", "service_tier", "store", "suffix", "verbosity", "web_search_options", "image_url",
        "input_audio", "include_obfuscation",
    }
)  # fmt: skip
"""OpenAI's fields that have no effect here yet: refused by name, so that nobody believes they work."""
