"""XQuant: keep a layer's input instead of its keys and values, and compute these from it when they are needed."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

import numpy as np
import torch
from numpy.typing import NDArray

from covey.compression.grid import from_grid, grid_bytes, to_grid
from covey.compression.pages import Floats, Pages
from covey.errors import DataCorrupt, InvalidArgument

from .batch import Batch
from .config import ModelConfig
from .decoder import Layers
from .rotary import inverse_frequencies, rotary_phases, rotate
from .weights import LayerWeights, Weights

BASE_BITS = 8
"""Of the first layer's input, which every difference between layers builds on."""


class Keep(StrEnum):
    """What is kept of a token and layer.

    INPUT: the layer's input (XQuant; half of keys and values where each head has its own). LATENT: the input in the
    directions that keys and values depend on, by SVD of [W_k W_v] (XQuant for GQA; as many numbers as keys and
    values). CROSS_LAYER: the input's difference to what was restored of the layer before (XQuant-CL).
    """

    INPUT = "INPUT"
    LATENT = "LATENT"
    CROSS_LAYER = "CROSS_LAYER"


class Recorder:
    """`decoder.Layers` that also keeps what goes into each layer, divided by its root mean square.

    The norm's weights are left out, as they are folded into the products: so the inputs of neighbouring layers are
    alike (ours; the paper keeps the input after the whole norm).
    """

    def __init__(self, inner: Layers, config: ModelConfig) -> None:
        self._inner = inner
        self._eps = config.rms_eps
        self._seen: list[list[torch.Tensor]] = [[] for _ in range(config.n_layers)]

    @property
    def name(self) -> str:
        """The kernels that compute."""
        return self._inner.name

    def forward(self, hidden: torch.Tensor, phases: torch.Tensor, batch: Batch, first: int, last: int) -> None:
        """See `decoder.Layers.forward`."""
        for layer in range(first, last):
            self._seen[layer].append(hidden * torch.rsqrt(hidden.square().mean(dim=1, keepdim=True) + self._eps))
            self._inner.forward(hidden, phases, batch, layer, layer + 1)

    def head(self, hidden: torch.Tensor) -> torch.Tensor:
        """See `decoder.Layers.head`."""
        return self._inner.head(hidden)

    def take(self) -> Floats:
        """The inputs since the last call: [layer, token, hidden]. For one sequence at a time."""
        found = torch.stack([torch.cat(seen) for seen in self._seen]).numpy()
        for seen in self._seen:
            seen.clear()
        return found


@dataclass(frozen=True, slots=True, kw_only=True)
class _Product:
    """Keys and values of a layer: `down` [hidden, kept] is applied before, `up` [kept, keys and values] after."""

    down: torch.Tensor | None
    up: torch.Tensor


class Xquant:
    """Encodes the layer inputs of a block's tokens and computes its keys and values from them."""

    def __init__(self, config: ModelConfig, weights: Weights, *, keep: Keep, bits: int) -> None:
        if bits not in (2, 4, 8):
            raise InvalidArgument("2, 4 or 8 bits a number", field="bits")
        self._config = config
        self._layers = weights.layers
        self._keep = keep
        self._bits = bits
        self._frequencies = inverse_frequencies(config)
        self._products = [_product(config, layer, keep) for layer in weights.layers]

    def block_bytes(self, tokens: int) -> int:
        """A block of `tokens` tokens as it is encoded."""
        return sum(grid_bytes(self._width(i), tokens, self._bits_of(i)) for i in range(self._config.n_layers))

    def encode(self, inputs: Floats) -> bytes:
        """Encode [layer, token, hidden], as `Recorder.take` gives them. Raises `InvalidArgument` for NaN and infinity.

        A channel is a group over the block's tokens: scales differ from channel to channel, not from token to token.
        """
        if not np.isfinite(inputs).all():
            raise InvalidArgument("layer inputs with NaN or infinity are never stored", field="inputs")
        parts = []
        before: Floats | None = None
        for i, given in enumerate(inputs):
            wanted = given if before is None else given - before
            data = to_grid(self._reduced(i, wanted).T[None].copy(), self._bits_of(i))
            parts.append(data.tobytes())
            if self._keep is Keep.CROSS_LAYER:
                restored = from_grid(data, (self._width(i), len(given)), self._bits_of(i))[0].T
                before = restored if before is None else before + restored
        return b"".join(parts)

    def rematerialise(self, data: bytes, positions: NDArray[np.int64]) -> Pages:
        """Keys, turned to `positions`, and values of an encoded block. Raises `DataCorrupt`."""
        tokens = len(positions)
        if len(data) != self.block_bytes(tokens):
            raise DataCorrupt(f"an encoded block of {tokens} tokens has {self.block_bytes(tokens)} bytes")
        phases = rotary_phases(torch.from_numpy(positions.astype(np.float32)), self._frequencies)
        keys, values, at = [], [], 0
        whole: Floats | None = None
        for i, layer in enumerate(self._layers):
            size = grid_bytes(self._width(i), tokens, self._bits_of(i))
            row = np.frombuffer(data, dtype=np.uint8, count=size, offset=at)[None]
            kept = from_grid(row, (self._width(i), tokens), self._bits_of(i))[0].T
            at += size
            if self._keep is Keep.CROSS_LAYER:
                kept = whole = kept if whole is None else whole + kept
            both = torch.from_numpy(np.ascontiguousarray(kept)) @ self._products[i].up
            k, v = self._heads(both, layer, phases)
            keys.append(k.permute(1, 2, 0))
            values.append(v.transpose(0, 1))
        return Pages(keys=torch.stack(keys).numpy(), values=torch.stack(values).numpy())

    def _heads(
        self, both: torch.Tensor, layer: LayerWeights, phases: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        config = self._config
        if layer.qkv_bias is not None:
            both = both + layer.qkv_bias[config.n_heads * config.head_dim :]
        k, v = both.view(len(both), 2, config.n_kv_heads, config.head_dim).unbind(1)
        if layer.k_norm is not None:
            k = torch.nn.functional.rms_norm(k, layer.k_norm.shape, layer.k_norm, config.rms_eps)
        return rotate(k, phases), v

    def _reduced(self, index: int, inputs: Floats) -> Floats:
        down = self._products[index].down
        return inputs if down is None else (torch.from_numpy(inputs) @ down).numpy()

    def _width(self, index: int) -> int:
        return int(self._products[index].up.shape[0])

    def _bits_of(self, index: int) -> int:
        return BASE_BITS if self._keep is Keep.CROSS_LAYER and index == 0 else self._bits


def _product(config: ModelConfig, layer: LayerWeights, keep: Keep) -> _Product:
    """Of the folded [W_k W_v]; for latents its left singular vectors come before, the rest after."""
    queries = config.n_heads * config.head_dim
    whole = (layer.qkv.rows()[queries:] * layer.attn_norm).T.contiguous()
    if keep is not Keep.LATENT:
        return _Product(down=None, up=whole)
    left, sizes, right = torch.linalg.svd(whole, full_matrices=False)
    return _Product(down=left.contiguous(), up=(sizes[:, None] * right).contiguous())
