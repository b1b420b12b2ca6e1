"""Where memory figures come from: the kernel's account of processes, torch's allocators, and the GPU's driver."""

from __future__ import annotations

import resource
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

import psutil
import torch

PROC_STATUS = Path("/proc/self/status")


class PeakSource(Protocol):
    """Tells the peak of a stretch of time, in bytes."""

    def begin(self) -> None:
        """Begin a stretch."""

    def peak(self) -> int:
        """Return the peak since it began."""


class AllocatorPeak:
    """The peak of what torch's CUDA allocator has given out."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def begin(self) -> None:
        """Forget the peak so far."""
        torch.cuda.reset_peak_memory_stats(self.device)

    def peak(self) -> int:
        """Return the peak since then."""
        return torch.cuda.max_memory_allocated(self.device)


class ResidentPeak:
    """The peak of this process's resident memory, as far as the kernel tells it.

    The kernel keeps one peak for the process's life. Where that has grown it is this stretch's; else the stretch stayed
    below it, and what was resident at its two ends is all that is known.
    """

    def __init__(self) -> None:
        self.begin()

    def begin(self) -> None:
        """Remember what there is."""
        status = PROC_STATUS.read_text()
        self._rss, self._peak = rss_bytes(status), peak_rss_bytes(status)

    def peak(self) -> int:
        """Return the peak since then."""
        status = PROC_STATUS.read_text()
        rss, peak = rss_bytes(status), peak_rss_bytes(status)
        return peak if peak > self._peak else max(self._rss, rss)


def rss_bytes(proc_status: str) -> int:
    """Return this process's resident memory, given the text of its `/proc/self/status`."""
    resident = _kernels_figure(proc_status, "VmRSS")
    return int(psutil.Process().memory_info().rss) if resident is None else resident


def peak_rss_bytes(proc_status: str) -> int:
    """Return this process's peak resident memory, given the text of its `/proc/self/status`.

    NOTE: `getrusage` is only the way out for kernels without VmHWM: its figure survives `exec`, so a run that was
    launched by a larger process would report its parent's peak.
    """
    peak = _kernels_figure(proc_status, "VmHWM")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 if peak is None else peak  # KiB on Linux


def _kernels_figure(proc_status: str, name: str) -> int | None:
    for line in proc_status.splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    return None


def tree_rss_bytes(process: psutil.Process, *, without: Collection[int] = ()) -> int:
    """Return the resident memory of a process and all its children.

    Pages that processes share, as forked data workers do, count once for each of them.

    Args:
        without: Ids of children that do not count, nor do their own children.
    """
    rss: int = process.memory_info().rss
    left_out = set(without)
    for child in process.children(recursive=True):  # a parent comes before its children
        with suppress(psutil.NoSuchProcess):  # a data worker may end between being listed and being read
            if child.pid in left_out or (left_out and child.ppid() in left_out):
                left_out.add(child.pid)
            else:
                rss += child.memory_info().rss
    return rss


def pinned_bytes() -> int:
    """Return the host memory that torch has pinned for copies to a GPU."""
    stats: dict[str, Any] = getattr(torch.cuda, "host_memory_stats", dict)()
    return int(stats.get("allocated_bytes.current", 0))


def gpu_bytes(device: torch.device) -> dict[str, int]:
    """Return this process's share of a GPU by its allocator, and all of the GPU as `nvidia-smi` shows it."""
    free, total = torch.cuda.mem_get_info(device)
    return {
        "allocated": torch.cuda.memory_allocated(device),
        "reserved": torch.cuda.memory_reserved(device),
        "used": total - free,
        "total": total,
    }
