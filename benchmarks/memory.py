"""How much memory a process really costs: proportional set size, where shared pages are counted once."""

from __future__ import annotations

from pathlib import Path


def pss_bytes(pid: int) -> int:
    """Proportional set size of a process in bytes (`Pss` of `/proc/PID/smaps_rollup`)."""
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"the kernel reports no Pss for process {pid}")
