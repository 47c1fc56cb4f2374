"""Compiles the native kernels; run by the build, and by hand after a change: `python covey/model/native/compile.py`.

Standard library only: a build has no torch.
"""

from __future__ import annotations

import platform
import shutil
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
FLAGS = {
    "avx2": ("-mavx2", "-mfma", "-mf16c"),
    "avx512": ("-march=x86-64-v4", "-mavx512vnni", "-mf16c"),
}
COMMON = ("-O3", "-std=c++17", "-fPIC", "-shared", "-fopenmp", "-Wall", "-Wextra", "-Wno-maybe-uninitialized")


def compile_kernels() -> list[Path]:
    """Compile for each kind of processor; returns what was made: nothing off x86 or without a compiler."""
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None or platform.machine() not in ("x86_64", "AMD64"):
        return []
    folder = HERE / "lib"
    folder.mkdir(exist_ok=True)
    made = []
    for name, flags in FLAGS.items():
        target = folder / f"{name}.so"
        draft = target.with_suffix(".draft")
        command = [compiler, *COMMON, *flags, "-o", str(draft), str(HERE / "forward.cpp")]
        done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603
        if done.returncode == 0:
            draft.replace(target)  # a process that has the old one mapped keeps it
            made.append(target)
        else:
            print(f"covey: {target.name} is left out, torch computes instead: {done.stderr[-2000:]}", file=sys.stderr)  # noqa: T201
    return made


if __name__ == "__main__":
    for path in compile_kernels():
        print(path)  # noqa: T201
