"""From a job to its sequences: tokens, limits, sampling with every default filled in."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

import anyio.to_thread

from covey.errors import InvalidArgument
from covey.types.generate import STOP_CHARS_MAX, GenerateRequest, Sampling
from covey.types.ids import RequestId
from covey.types.program import CallParams

from .job import COMPLETION_TOKENS_DEFAULT, SEQUENCES_MAX, Job, Prompt
from .models import Catalog, LocalModel
from .tools.forced import forced_grammar

SEED_BITS = 63
BIAS_MAX = 100
INLINE_CHARS = 20_000
"""Longer prompts are tokenized in a thread, so that they hold nobody up."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Planned:
    """One sequence to generate. `index` is its choice; `prompt_index` which prompt it continues."""

    index: int
    prompt_index: int
    prompt: Prompt
    request: GenerateRequest


async def plan(job: Job, model: LocalModel, catalog: Catalog, rng: Random) -> tuple[Planned, ...]:
    """Tokenize and check a job.

    Raises:
        ContextLengthExceeded: prompt and answer do not fit.
        InvalidArgument: too many choices, an empty prompt or stop, tokens that the model does not have.
    """
    n = job.params.n
    if n * len(job.prompts) > SEQUENCES_MAX:
        raise InvalidArgument(f"prompts times n must be at most {SEQUENCES_MAX}", field="n")
    if not all(0 < len(stop) <= STOP_CHARS_MAX for stop in job.params.stop):
        raise InvalidArgument(f"a stop text has 1 to {STOP_CHARS_MAX} characters", field="stop")
    vocabulary = model.tokenizer.vocab_size
    if any(not 0 <= token < vocabulary for token in job.params.logit_bias):
        raise InvalidArgument(f"token ids must be below {vocabulary}", field="logit_bias")
    if not all(-BIAS_MAX <= bias <= BIAS_MAX for bias in job.params.logit_bias.values()):
        raise InvalidArgument(f"a bias must be from -{BIAS_MAX} to {BIAS_MAX}", field="logit_bias")
    grammar = job.params.grammar
    if job.tooling is not None:
        grammar = forced_grammar(job.tooling, model.dialect) or grammar
    limit = catalog.context_limit(model)
    seed = rng.getrandbits(SEED_BITS) if job.params.seed is None else job.params.seed
    planned: list[Planned] = []
    for p, prompt in enumerate(job.prompts):
        ids = await _encode(model, prompt)
        model.check_length(len(ids), job.params.max_tokens, limit, prompt.field)
        for i in range(n):
            index = p * n + i
            sampling = _sampling(job.params, prompt, seed, i, limit - len(ids))
            planned.append(
                Planned(
                    index=index,
                    prompt_index=p,
                    prompt=prompt,
                    request=_request(job, model, ids, sampling, index, grammar),
                )
            )
    return tuple(planned)


def _request(
    job: Job, model: LocalModel, ids: tuple[int, ...], sampling: Sampling, index: int, grammar: str
) -> GenerateRequest:
    return GenerateRequest(
        request_id=RequestId(f"{job.request_id}-{index}"),
        tenant=job.tenant,
        model=model.name,
        scopes=(),
        token_ids=ids,
        sampling=sampling,
        grammar=grammar,
        stop=job.params.stop,
        deadline_s=0.0,  # what is left is filled in when it is sent
        program_id=job.program_id,
        call_id=job.call_id,
        priority=job.priority,
        hints=job.hints,
    )


def _sampling(params: CallParams, prompt: Prompt, seed: int, choice: int, room: int) -> Sampling:
    default_tokens = room if prompt.messages else min(room, COMPLETION_TOKENS_DEFAULT)
    return Sampling(
        max_tokens=default_tokens if params.max_tokens is None else params.max_tokens,
        seed=(seed + choice) % 2**SEED_BITS,
        temperature=1.0 if params.temperature is None else params.temperature,
        top_p=1.0 if params.top_p is None else params.top_p,
        top_k=params.top_k or 0,
        min_p=params.min_p or 0.0,
        presence_penalty=params.presence_penalty or 0.0,
        frequency_penalty=params.frequency_penalty or 0.0,
        repetition_penalty=1.0 if params.repetition_penalty is None else params.repetition_penalty,
        logit_bias=params.logit_bias,
        logprobs=params.logprobs,
        min_tokens=params.min_tokens or 0,
        ignore_eos=params.ignore_eos,
    )


async def _encode(model: LocalModel, prompt: Prompt) -> tuple[int, ...]:
    chars = sum(len(m.content) for m in prompt.messages) + len(prompt.text or "")
    if chars <= INLINE_CHARS:
        return model.encode(prompt)
    return await anyio.to_thread.run_sync(model.encode, prompt)
