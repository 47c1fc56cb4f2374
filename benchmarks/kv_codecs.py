"""What each codec of stored blocks costs in memory, in time and in quality; `python -m benchmarks.kv_codecs`."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import click
import numpy as np
import torch
from rich.console import Console

from benchmarks.perplexity import fixed_text
from benchmarks.report import Report
from covey.clock import Clock, MonotonicClock
from covey.compression import Codebook, Codec, Fp16, Int8, Pq4, decode, encode
from covey.compression.pages import Floats, Pages, write_pages
from covey.errors import InvalidArgument
from covey.model.codebook import train_codebook
from covey.model.loading import load
from covey.model.runner import TorchRunner, open_runner
from covey.model.source import resolve
from covey.model.tokenizer import open_tokenizer
from covey.model.xquant import Keep, Recorder, Xquant
from covey.types.block import BlockShape

BLOCK_TOKENS = 32
PREFIX_TOKENS, WINDOW_TOKENS = 512, 768
"""The context whose blocks pass through a codec, and all that is run: what follows the context is scored."""
RECENT_BLOCKS = 1
"""The end of the context stays as it is, as stores leave it."""
WINDOWS, QUICK_WINDOWS = 12, 3
TRAIN_TOKENS, QUICK_TRAIN_TOKENS = 8192, 1024
XQUANTS = ((Keep.INPUT, 8), (Keep.INPUT, 4), (Keep.LATENT, 8), (Keep.LATENT, 4), (Keep.CROSS_LAYER, 4))


@dataclass(frozen=True, slots=True, kw_only=True)
class Context:
    """The blocks of a context as the engine made them, and what went into each layer: [layer, token, hidden]."""

    blocks: tuple[bytes, ...]
    inputs: Floats


class Way(Protocol):
    """One way to keep blocks: encodes a block of a context, and restores it."""

    def encode(self, context: Context, block: int) -> bytes:
        """The bytes that are kept."""
        ...

    def restore(self, data: bytes, block: int, into: memoryview) -> None:
        """Write the block's payload."""
        ...


class Coded:
    """Keys and values through a codec of the store."""

    def __init__(self, codec: Codec, shape: BlockShape) -> None:
        self._codec, self._shape = codec, shape

    def encode(self, context: Context, block: int) -> bytes:
        return encode(self._codec, context.blocks[block], self._shape)

    def restore(self, data: bytes, block: int, into: memoryview) -> None:
        decode(self._codec, data, self._shape, into)


class Rematerialised:
    """Layer inputs, from which keys and values are computed again."""

    def __init__(self, xquant: Xquant, shape: BlockShape) -> None:
        self._xquant, self._shape = xquant, shape

    def encode(self, context: Context, block: int) -> bytes:
        return self._xquant.encode(context.inputs[:, self._tokens(block)])

    def restore(self, data: bytes, block: int, into: memoryview) -> None:
        positions = np.arange(self._tokens(block).start, self._tokens(block).stop)
        found: Pages = self._xquant.rematerialise(data, positions)
        write_pages(found, self._shape, 0, into)

    def _tokens(self, block: int) -> slice:
        return slice(block * self._shape.tokens, (block + 1) * self._shape.tokens)


@dataclass(slots=True, kw_only=True)
class Figures:
    """What was measured of one way, over all windows."""

    losses: list[float] = field(default_factory=list)
    encode_rates: list[float] = field(default_factory=list)
    decode_rates: list[float] = field(default_factory=list)
    block_bytes: int = 0


class Bench:
    """A runner whose contexts pass through ways of keeping them."""

    def __init__(self, runner: TorchRunner, recorder: Recorder, clock: Clock) -> None:
        self._runner, self._recorder, self._clock = runner, recorder, clock
        self._size = runner.info.block_bytes

    def context(self, window: Sequence[int]) -> Context:
        """Run the context of a window."""
        self._runner.score(window[:PREFIX_TOKENS])
        views = [self._runner.block_view(block) for block in range(PREFIX_TOKENS // BLOCK_TOKENS)]
        return Context(blocks=tuple(bytes(view) for view in views), inputs=self._recorder.take())

    def pass_through(self, context: Context, way: Way | None, window: Sequence[int], figures: Figures) -> None:
        """Encode and restore all but the recent blocks of a context, on one core, and score what follows it."""
        cores = torch.get_num_threads()
        torch.set_num_threads(1)
        for block, raw in enumerate(context.blocks):
            view = self._runner.block_view(block)
            if way is None or block >= len(context.blocks) - RECENT_BLOCKS:
                view[:] = raw
                continue
            began = self._clock.now()
            data = way.encode(context, block)
            middle = self._clock.now()
            way.restore(data, block, view)
            figures.encode_rates.append(self._size / (middle - began))
            figures.decode_rates.append(self._size / (self._clock.now() - middle))
            figures.block_bytes = len(data)
        torch.set_num_threads(cores)
        figures.losses.append(-float(np.mean(self._runner.score(window, known=PREFIX_TOKENS))))
        self._recorder.take()


def run(
    model: str, cache_dir: Path, console: Console, *, quick: bool, data: Path | None, codebook: Codebook | None = None
) -> Report:
    """Score continuations of the same contexts after every codec.

    Without a `codebook` one is trained first: on solved problems that are not scored, where there is data, else on
    the project's documents. Raises CoveyError when the model cannot be loaded.
    """
    source, clock = resolve(model), MonotonicClock()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    text = open_tokenizer(source).encode(fixed_text(data))
    windows = list(_windows(text, QUICK_WINDOWS if quick else WINDOWS))
    books = {"pq4": codebook} if codebook else _trained(model, cache_dir, console, quick=quick, data=data)
    loaded = load(source, cache_dir=cache_dir, n_blocks=1, block_size=BLOCK_TOKENS)
    runner = open_runner(source, cache_dir=cache_dir, n_blocks=WINDOW_TOKENS // BLOCK_TOKENS, block_size=BLOCK_TOKENS,
                         kv_dtype="fp32")  # fmt: skip
    shape = runner.info.shape
    ways: dict[str, Way | None] = {"raw": None, "fp16": Coded(Fp16(), shape), "int8": Coded(Int8(), shape)}
    ways |= {name: Coded(Pq4(book), shape) for name, book in books.items()}
    for keep, bits in XQUANTS:
        name = f"xquant-{keep.lower().replace('_', '-')}-{bits}"
        ways[name] = Rematerialised(Xquant(loaded.config, loaded.weights, keep=keep, bits=bits), shape)
    try:
        bench = Bench(runner, runner.wrap_layers(lambda layers: Recorder(layers, loaded.config)), clock)
        found = _measure(bench, windows, ways, console)
    finally:
        runner.close()
    report = Report("kv_codecs")
    add_rows(report, found, shape.size_bytes)
    return report


def add_rows(report: Report, found: Mapping[str, Figures], raw_bytes: int) -> None:
    """Add each codec's memory, speed and perplexity; the first of `found` is what the others are compared with."""
    reference = next(iter(found.values()))
    for name, figures in found.items():
        block_bytes = figures.block_bytes or raw_bytes
        # Window by window: the text's own ups and downs, which are the same for every codec, cancel out.
        changes = [100 * math.expm1(mine - base) for mine, base in zip(figures.losses, reference.losses, strict=True)]
        for metric, unit, samples, at in (
            ("kv_bytes_per_token", "bytes", [block_bytes / BLOCK_TOKENS], "mean"),
            ("compression", "", [raw_bytes / block_bytes], "mean"),
            ("encode_bytes_per_s", "bytes/s", figures.encode_rates, "p50"),
            ("decode_bytes_per_s", "bytes/s", figures.decode_rates, "p50"),
            ("perplexity", "", [math.exp(sum(figures.losses) / len(figures.losses))], "mean"),
            ("perplexity_change", "%", changes, "mean"),
        ):
            report.add(case=name, system="covey", metric=metric, unit=unit, samples=samples, at=at)


def _measure(
    bench: Bench, windows: Sequence[Sequence[int]], ways: Mapping[str, Way | None], console: Console
) -> dict[str, Figures]:
    found = {name: Figures() for name in ways}
    for number, window in enumerate(windows):
        context = bench.context(window)
        for name, way in ways.items():
            with console.status(f"text {number + 1} of {len(windows)}: {name}"):
                bench.pass_through(context, way, window, found[name])
    return found


def _windows(text: Sequence[int], count: int) -> Iterator[list[int]]:
    if len(text) < WINDOW_TOKENS:
        raise InvalidArgument(f"the text has {len(text)} tokens, a window takes {WINDOW_TOKENS}", field="data")
    for start in range(0, min(len(text) - WINDOW_TOKENS + 1, count * WINDOW_TOKENS), WINDOW_TOKENS):
        yield list(text[start : start + WINDOW_TOKENS])


def _trained(model: str, cache_dir: Path, console: Console, *, quick: bool, data: Path | None) -> dict[str, Codebook]:
    """Codebooks from a text of the kind that is scored, where there is one, and from one of another kind."""
    texts = {"pq4-foreign": _documents()}
    rows = data / "gsm8k" / "test.jsonl" if data else None
    if rows is not None and rows.exists():
        texts["pq4"] = _solved(rows)
    tokens = QUICK_TRAIN_TOKENS if quick else TRAIN_TOKENS
    found = {}
    for name, text in sorted(texts.items()):
        with console.status(f"{name}: training on {tokens} tokens"):
            found[name] = train_codebook(model, text, cache_dir, tokens=tokens)
    return found


def _solved(file: Path) -> str:
    """GSM8K after the hundred problems that are scored."""
    rows = [json.loads(line) for line in file.read_text().splitlines() if line.strip()]
    return "\n\n".join(f"{row['question']}\n{row['answer']}" for row in rows[100:])


def _documents() -> str:
    root = Path(__file__).resolve().parent.parent
    return "\n\n".join(path.read_text() for path in [root / "README.md", *sorted((root / "docs").glob("*.md"))])


@click.command()
@click.option("--quick", is_flag=True, help="Three texts, and a small codebook.")
@click.option("--data", type=click.Path(exists=True, file_okay=False, path_type=Path), envvar="COVEY_DATA")
@click.option("--json", "target", help="Write the result here; - for standard output.")
@click.option("--model", default="smollm2", show_default=True)
@click.option("--cache", type=click.Path(file_okay=False, path_type=Path), default=Path(".covey/cache"))
@click.option("--codebook", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="Instead of training.")
def main(quick: bool, data: Path | None, target: str | None, model: str, cache: Path, codebook: Path | None) -> None:
    """Bytes a token, speed, and change of perplexity of every codec of stored blocks."""
    console = Console(stderr=target == "-")
    book = Codebook.from_bytes(codebook.read_bytes()) if codebook else None
    report = run(model, cache, console, quick=quick, data=data, codebook=book)
    if target != "-":
        report.print(console)
    report.write(target)


if __name__ == "__main__":
    main()
