"""How much of the machine others used while a system was measured: beside busy neighbours a figure says little."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from covey.clock import Clock

BUSY_SHARE = 0.1
"""Above this share of the cores, a measurement is called disturbed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CpuTime:
    """Seconds of CPU since boot: of everything on the machine, stolen time included, and of the measured processes."""

    at_s: float
    machine_s: float
    measured_s: float


def cpu_time(pids: Iterable[int], clock: Clock) -> CpuTime:
    """What the machine, and `pids` with this process, have used so far."""
    measured_s = sum(_process_s(pid) for pid in {*pids, os.getpid()})
    return CpuTime(at_s=clock.now(), machine_s=_machine_s(), measured_s=measured_s)


def others_cores(before: CpuTime, after: CpuTime) -> float:
    """Cores that were busy with anything else between two readings, on average."""
    used_s = (after.machine_s - before.machine_s) - (after.measured_s - before.measured_s)
    return max(0.0, used_s / max(after.at_s - before.at_s, 1e-3))


def is_disturbed(cores: float) -> bool:
    """Whether others used too much of the cores that this process may run on."""
    return cores > BUSY_SHARE * len(os.sched_getaffinity(0))


def _machine_s() -> float:
    """Busy time of `/proc/stat`: user, nice, system, irq, softirq and steal; guests are within user and nice."""
    user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, Path("/proc/stat").read_text().split()[1:9])
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def _process_s(pid: int) -> float:
    """User and system time of all threads of a process; 0 once it is gone."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except FileNotFoundError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
