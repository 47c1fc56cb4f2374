"""Generate `covey/wire` from `proto/`, and compile the native kernels, whenever covey is built or installed."""

from __future__ import annotations

import shutil
import subprocess
import sys
import sysconfig
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
        if self.target_name == "wheel" and self._compile_kernels(root):
            build_data["pure_python"] = False
            build_data["tag"] = f"py3-none-{sysconfig.get_platform().replace('-', '_').replace('.', '_')}"

    @staticmethod
    def _compile_kernels(root: Path) -> bool:
        """Whether there is a compiler and a processor for them; without, covey computes with torch."""
        script = root / "covey" / "model" / "native" / "compile.py"
        done = subprocess.run([sys.executable, str(script)], check=True, capture_output=True, text=True)
        return bool(done.stdout.strip())
