"""Attention over a part of a sequence's keys and values, and the merge of such parts (Infinite-LLM: DistAttention)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from .pool import KvPool


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """What a shard of the keys says: `out` [token, head, head_dim] is its softmax-weighted mean of the values, `lse`
    [token, head] the log of the sum of its exponentials. A shard without keys has `out` 0 and `lse` -inf.
    """

    out: torch.Tensor
    lse: torch.Tensor


def attend(q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, *, start: int | None = None) -> Part:
    """Attend `q` [token, head, head_dim] to `keys` and `values` [kv head, position, head_dim].

    With `start`, the first query stands at that position among the keys and sees none after its own; without, every
    query sees all keys. Query heads share the kv heads in equal groups.
    """
    tokens, heads, width = q.shape
    kv_heads, count = keys.shape[0], keys.shape[1]
    if not count:
        return Part(out=torch.zeros_like(q), lse=torch.full((tokens, heads), float("-inf")))
    grouped = q.view(tokens, kv_heads, heads // kv_heads, width).permute(1, 2, 0, 3)  # [kv, group, token, width]
    scores = grouped @ keys[:, None].transpose(2, 3) * width**-0.5
    if start is not None:
        visible = torch.ones(tokens, count, dtype=torch.bool).tril_(start)
        scores = scores.masked_fill(~visible, float("-inf"))
    lse = torch.logsumexp(scores, dim=-1)
    weights = torch.exp(scores - torch.where(torch.isinf(lse), 0.0, lse)[..., None])
    out = weights @ values[:, None]
    return Part(
        out=out.permute(2, 0, 1, 3).flatten(1, 2).contiguous(), lse=lse.permute(2, 0, 1).flatten(1).contiguous()
    )


def merge(parts: Iterable[Part]) -> Part:
    """One part over the keys of all: associative and commutative, and parts without keys change nothing.

    M = max lse_k, w_k = exp(lse_k - M), out = sum(w_k out_k) / sum(w_k), lse = M + log(sum(w_k)). Raises ValueError for
    no part at all.
    """
    given = list(parts)
    if not given:
        raise ValueError("nothing to merge")
    if len(given) == 1:
        return given[0]
    lses = torch.stack([part.lse for part in given])
    top = lses.amax(dim=0)
    safe = torch.where(torch.isinf(top), 0.0, top)
    weights = torch.exp(lses - safe)
    total = weights.sum(dim=0)
    divisor = torch.where(total > 0, total, 1.0)
    outs = torch.stack([part.out for part in given])
    return Part(out=(weights[..., None] * outs).sum(dim=0) / divisor[..., None], lse=safe + torch.log(total))


def attend_blocks(pool: KvPool, layer: int, blocks: tuple[int, ...], q: torch.Tensor) -> Part:
    """Attend to all positions of full `blocks` in one layer. Only reads: any thread may call it beside a step that does
    not write those blocks.
    """
    with torch.inference_mode():
        if not blocks:
            empty = torch.empty(pool.geometry.kv_heads, 0, pool.geometry.head_dim)
            return attend(q, empty, empty)
        keys, values = pool.read(layer, torch.tensor(blocks))
        return attend(q, keys, values)
