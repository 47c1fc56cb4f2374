"""Which processes a mesh has, how they are named and set, and how their progress is told."""

from __future__ import annotations

import io
import json
import socket
from pathlib import Path
from typing import Any

from rich.console import Console

from covey.cli.child import ChildSpec
from covey.cli.files import MeshFiles
from covey.cli.mesh import DRAIN_ORDER, MeshPlan
from covey.cli.up import Progress, port_or_next


def children_of(folder: Path, models: dict[str, str], **plan: Any) -> dict[str, ChildSpec]:
    files = MeshFiles(run_dir=folder, cache_dir=folder / "cache")
    return {spec.name: spec for spec in MeshPlan(files=files, models=models, **plan).children()}


def settings_of(spec: ChildSpec) -> list[str]:
    return [text for flag, text in zip(spec.flags, spec.flags[1:], strict=False) if flag == "--set"]


def test_one_of_each_by_default(tmp_path: Path) -> None:
    children = children_of(tmp_path, {"smollm2": "smollm2"})
    roles = [spec.module.removeprefix("services.") for spec in children.values()]
    assert sorted(roles) == sorted(DRAIN_ORDER)
    assert set(children) == {f"{role}-0" for role in DRAIN_ORDER}


def test_every_model_has_workers_of_its_own(tmp_path: Path) -> None:
    children = children_of(tmp_path, {"a": "smollm2", "b": "/models/b"}, prefill=2, decode=1, kvstore=3)
    assert {name for name in children if name.startswith(("prefill", "decode"))} == {
        "prefill-0-a",
        "prefill-1-a",
        "decode-0-a",
        "prefill-0-b",
        "prefill-1-b",
        "decode-0-b",
    }
    assert {"model=/models/b", "model_name=b", "worker=decode-0-b"} <= set(settings_of(children["decode-0-b"]))
    assert sum(name.startswith("kvstore") for name in children) == 3


def test_a_mesh_of_remote_models_needs_no_engine(tmp_path: Path) -> None:
    children = children_of(tmp_path, {}, remotes={"far": "https://host.example/v1"})
    assert set(children) == {"kvstore-0", "semcache-0", "gateway-0", "agentflow-0"}


def test_a_setting_reaches_every_process_of_its_role_and_no_other(tmp_path: Path) -> None:
    children = children_of(tmp_path, {"m": "m"}, decode=2, settings=("decode.kv_blocks=7",))
    told = {name for name, spec in children.items() if "kv_blocks=7" in settings_of(spec)}
    assert told == {"decode-0", "decode-1"}


def test_a_child_reads_the_meshs_file_and_never_the_working_directory(tmp_path: Path) -> None:
    spec = children_of(tmp_path, {"m": "m"})["gateway-0"]
    command = spec.command(ready_fd=9)
    assert command[1:4] == ["-P", "-m", "services.gateway"]
    assert command[command.index("--config") + 1] == str(tmp_path / "mesh.toml")
    assert command[-3:] == ["--die-with-parent", "--ready-fd", "9"]


def test_a_taken_port_gives_way_to_a_free_one() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert port_or_next(port) == 0
    assert port_or_next(port) == port
    assert port_or_next(0) == 0


def test_progress_is_a_line_a_change() -> None:
    out = io.StringIO()
    progress = Progress(Console(file=out, width=80), as_json=False)
    progress("kvstore-0", "starting")
    progress("kvstore-0", "ready in 0.5 s")
    assert [line.split() for line in out.getvalue().splitlines()] == [
        ["kvstore-0", "starting"],
        ["kvstore-0", "ready", "in", "0.5", "s"],
    ]


def test_progress_as_json_is_an_object_a_line() -> None:
    out = io.StringIO()
    Progress(Console(file=out, width=20), as_json=True)("a-rather-long-name-of-a-child", "starting")
    assert json.loads(out.getvalue()) == {"service": "a-rather-long-name-of-a-child", "state": "starting"}
