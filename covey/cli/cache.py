"""`covey cache`: what the semantic cache holds, why a request hits or misses, and how entries go, come and leave."""

from __future__ import annotations

import base64
import json
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TextIO, TypeVar

import anyio
import click
import msgspec
from rich.console import Console
from rich.table import Table

from covey.auth import MeshToken
from covey.client.endpoints import running_mesh
from covey.codec.methods import SemCache
from covey.errors import InvalidArgument, Unavailable
from covey.net.channels import Channel
from covey.types.common import Empty
from covey.types.ids import TenantId
from covey.types.semcache import CacheQuery, CacheRecord, CacheStats, ExportCache, InvalidateRequest

T = TypeVar("T")

LOCAL = "local"
CALL_S = 30.0
STREAM_S = 3600.0
LINE_CHARS_MAX = 16 * 1024 * 1024

_run_dir = click.option("--run-dir", type=click.Path(file_okay=False, path_type=Path), help="Of which mesh.")
_json = click.option("--json", "as_json", is_flag=True, help="One JSON object instead of text.")
_tenant = click.option("--tenant", default=LOCAL, show_default=True, help="Whose entries.")


@click.group()
def cache() -> None:
    """Look into the semantic cache, void, warm and export it."""


@cache.command()
@_json
@_run_dir
def stats(as_json: bool, run_dir: Path | None) -> None:
    """Entries, hits and estimated false hits of every category."""

    async def ask(channel: Channel) -> CacheStats:
        return await channel.call(SemCache.STATS, Empty(), timeout_s=CALL_S)

    found = _with_cache(run_dir, ask)
    if as_json:
        _print_json(found)
        return
    console = Console()
    ready = "ready" if found.encoder_ready else "not loaded: only equal requests are found"
    console.print(f"{found.entries:,} entries, {found.size_bytes / 2**20:,.1f} MiB; encoder {ready}")
    console.print(f"hits: {found.exact_hits:,} exact, {found.semantic_hits:,} semantic; misses: {found.misses:,}")
    table = Table("category", "mode", "entries", "look-ups", "hits", "by load", "false hits (95 %)", "stale")
    for one in found.categories:
        false = f"{one.false_hits:.3f} ({one.false_hits_low:.3f}-{one.false_hits_high:.3f})" if one.judged else "-"
        numbers = (one.entries, one.lookups, one.hits, one.relaxed_hits)
        table.add_row(one.category, one.mode, *map(str, numbers), false, str(one.stale_hits))
    if found.categories:
        console.print(table)


@cache.command()
@_tenant
@click.option("--model", default="", help="Only this model's.")
@click.option("--category", default="", help="Only this category's.")
@click.option("--entry", default="", help="Only this one.")
@click.option("--tag", default="", help="Only those offered with this tag.")
@click.option("--similar-to", default="", help="Only those that mean about this.")
@click.option("--similarity", type=click.FloatRange(0, 1), default=0.0, help="How much about: a cosine.")
@click.option(
    "--older-than", "older_than_s", type=click.FloatRange(0), default=0.0, help="Only older ones, in seconds."
)
@click.option("--all", "everything", is_flag=True, help="Everything of the tenant; needed when nothing narrows it.")
@click.option("--dry-run", is_flag=True, help="Only count.")
@_json
@_run_dir
def invalidate(
    tenant: str,
    model: str,
    category: str,
    entry: str,
    tag: str,
    similar_to: str,
    similarity: float,
    older_than_s: float,
    everything: bool,
    dry_run: bool,
    as_json: bool,
    run_dir: Path | None,
) -> None:
    """Void entries that match every option given."""
    request = InvalidateRequest(
        tenant=TenantId(tenant),
        model=model,
        category=category,
        entry=entry,
        tag=tag,
        similar_to=similar_to,
        similarity=similarity,
        older_than_s=older_than_s,
        dry_run=dry_run,
    )
    if not (everything or model or category or entry or tag or similar_to or older_than_s):
        raise InvalidArgument(f"this would void everything of tenant {tenant!r}: say --all if you mean it", field="all")
    reply = _with_cache(run_dir, lambda channel: channel.call(SemCache.INVALIDATE, request, timeout_s=CALL_S))
    if as_json:
        _print_json(reply)
    else:
        click.echo(
            f"{reply.removed} entries would go" if dry_run else f"{reply.removed} entries gone, epoch {reply.epoch}"
        )


@cache.command()
@click.argument("text")
@_tenant
@click.option("--model", required=True, help="As the request names it.")
@click.option("--category", default="", help="As the request names it; classified without.")
@click.option("--context", default="", help="The context key of the conversation, in base64, as `export` shows it.")
@_json
@_run_dir
def explain(
    text: str, tenant: str, model: str, category: str, context: str, as_json: bool, run_dir: Path | None
) -> None:
    """Say what a look-up of TEXT would do now, and why."""
    try:
        context_key = base64.b64decode(context, validate=True)
    except ValueError as error:
        raise InvalidArgument("--context takes base64, as `covey cache export` shows it", field="context") from error
    query = CacheQuery(tenant=TenantId(tenant), model=model, text=text, category=category, context_key=context_key)
    found = _with_cache(run_dir, lambda channel: channel.call(SemCache.EXPLAIN, query, timeout_s=CALL_S))
    if as_json:
        _print_json(found)
        return
    click.echo(
        f"category {found.category}: {found.mode}, threshold {found.threshold:g}, time to live {found.ttl_s:g} s"
    )
    if found.entry:
        click.echo(f"nearest entry {found.entry}, similarity {found.similarity:.4f}")
    click.echo(found.why)


@cache.command()
@click.argument("target", type=click.Path(dir_okay=False, allow_dash=True), default="-")
@_tenant
@click.option("--model", default="", help="Only this model's.")
@click.option("--category", default="", help="Only this category's.")
@_run_dir
def export(target: str, tenant: str, model: str, category: str, run_dir: Path | None) -> None:
    """Write a tenant's entries to TARGET, one JSON object a line; - for standard output."""
    request = ExportCache(tenant=TenantId(tenant), model=model, category=category)

    async def write(channel: Channel, out: TextIO) -> int:
        count = 0
        async with channel.stream(SemCache.EXPORT, request, timeout_s=STREAM_S) as records:
            async for record in records:
                out.write(msgspec.json.encode(record).decode() + "\n")
                count += 1
        return count

    if target == "-":
        _with_cache(run_dir, lambda channel: write(channel, sys.stdout))
        return
    with Path(target).open("w") as file:
        count = _with_cache(run_dir, lambda channel: write(channel, file))
    click.echo(f"{count} entries written to {target}", err=True)


@cache.command()
@click.argument("source", type=click.File("r"))
@click.option("--tenant", default="", help="Whose they become; those of the file by default.")
@_json
@_run_dir
def warm(source: TextIO, tenant: str, as_json: bool, run_dir: Path | None) -> None:
    """Take in entries from SOURCE, as `covey cache export` writes them; - for standard input."""

    async def records() -> AsyncIterator[CacheRecord]:
        for record in read_records(source, tenant):
            yield record

    reply = _with_cache(run_dir, lambda channel: channel.upload(SemCache.WARM, records(), timeout_s=STREAM_S))
    if as_json:
        _print_json(reply)
    else:
        click.echo(f"{reply.stored} entries stored, {reply.refused} refused by their category's policy")


def read_records(lines: Iterator[str] | TextIO, tenant: str) -> Iterator[CacheRecord]:
    """Read a file of records. Raises `InvalidArgument` naming the line that is wrong."""
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            if len(line) > LINE_CHARS_MAX:
                raise ValueError(f"longer than {LINE_CHARS_MAX} characters")
            record = msgspec.json.decode(line, type=CacheRecord)
        except (ValueError, msgspec.MsgspecError) as error:
            raise InvalidArgument(f"line {number} is no record as `covey cache export` writes it: {error}") from error
        yield replace(record, query=replace(record.query, tenant=TenantId(tenant))) if tenant else record


def _with_cache(run_dir: Path | None, ask: Callable[[Channel], Awaitable[T]]) -> T:
    """Ask the running mesh's cache. Raises `Unavailable` when it has none."""
    endpoints = running_mesh(run_dir)
    if not endpoints.semcache:
        raise Unavailable("this mesh runs no semcache: start one with `covey up`", field="run_dir")
    token = MeshToken(Path(endpoints.mesh_token_file).read_text()) if endpoints.mesh_token_file else None

    async def run() -> T:
        async with Channel.open(endpoints.semcache, token=token) as channel:
            return await ask(channel)

    return anyio.run(run)


def _print_json(value: object) -> None:
    click.echo(json.dumps(msgspec.to_builtins(value)))
