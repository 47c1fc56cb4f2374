"""The model executor: loading, tokenizing, one paged and batched runner, sampling.

`plan`, `config`, `source`, `tokenizer`, `text_stream` and `share` import no torch; `weights`, `layers`, `attention`
and `runner` do.
"""

from __future__ import annotations
