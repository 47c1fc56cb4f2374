"""Chat with the mesh through the official OpenAI client.

Run it with `covey run examples/chat.py`, or set OPENAI_BASE_URL and OPENAI_API_KEY yourself.
"""

from __future__ import annotations

from openai import OpenAI


def main() -> None:
    client = OpenAI()
    model = client.models.list().data[0].id
    stream = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": "Why do bees dance? Answer in one sentence."}],
        max_tokens=60,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    for chunk in stream:
        if chunk.choices and chunk.choices[0].delta.content:
            print(chunk.choices[0].delta.content, end="", flush=True)
        if chunk.usage:
            print(f"\n[{model}: {chunk.usage.prompt_tokens} tokens in, {chunk.usage.completion_tokens} out]")


if __name__ == "__main__":
    main()
