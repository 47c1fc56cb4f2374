"""Programs that run one system under measurement, each in that system's own environment.

Every model driver answers the same operations; times are seconds of wall clock.

- `prefill(prompt)`: from one prompt of token ids to its first token, nothing cached, logits for the last token only.
- `decode(prompts, steps)`: of each of `steps` steps that give every sequence a token, after all prompts are prefilled.
- `mixed(prompts, prompt)`: while `prompts` decode, one more arrives: the steps until its first token, and the number of
  tokens, its own and those that the others got meanwhile.
- `greedy(prompt, count)`: the token ids that follow, to see that it is the same model.
"""
