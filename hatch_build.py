"""Generate `covey/wire` from `proto/` whenever a wheel, an sdist or an editable install is built."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

PROTO = Path("proto/covey/wire/v1")


class GenerateWire(BuildHookInterface[Any]):
    """Run the pinned generator; its output is never committed."""

    PLUGIN_NAME = "custom"

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        root = Path(self.root)
        wire = root / "covey" / "wire"
        sources = sorted(str(p.relative_to(root)) for p in (root / PROTO).glob("*.proto"))
        if not sources:
            raise FileNotFoundError(f"no .proto files under {PROTO}")
        shutil.rmtree(wire, ignore_errors=True)
        command = [
            sys.executable,
            "-m",
            "grpc_tools.protoc",
            "-I",
            "proto",
            "--python_out=.",
            "--pyi_out=.",
            *sources,
        ]
        subprocess.run(command, cwd=root, check=True)
        for package in (wire, wire / "v1"):
            (package / "__init__.py").touch()
