"""What memory a run takes: the allocator's account of each optimizer step, the whole device's, and the host's.

Lightning's `DeviceStatsMonitor` reports the allocator's peak since the process began, which never falls, and host
memory as a percentage of the machine. Here a peak belongs to ONE optimizer step, and the host is the run's own
processes. Costs under 1 ms a step, and about 20 us per process of the machine once a second.
"""

import resource
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.types import STEP_OUTPUT
from typing_extensions import override

GIB = 1024**3
HOST_SECONDS = 1.0  # finding the child processes means walking /proc: dear on a machine with thousands of them


def gpu_memory(device: torch.device) -> dict[str, float]:
    """Measure a CUDA device in GiB: this process's allocator, and all of the device as `nvidia-smi` shows it."""
    free, total = torch.cuda.mem_get_info(device)
    return {
        "memory/gpu_allocated_gib": torch.cuda.memory_allocated(device) / GIB,
        "memory/gpu_reserved_gib": torch.cuda.memory_reserved(device) / GIB,
        "memory/gpu_peak_gib": torch.cuda.max_memory_allocated(device) / GIB,
        "memory/gpu_used_gib": (total - free) / GIB,
        "memory/gpu_total_gib": total / GIB,
    }


def tree_rss_bytes(process: psutil.Process) -> int:
    """Return the resident memory of a process and all its children.

    Pages that processes share, as forked data workers do, count once for each of them.
    """
    rss: int = process.memory_info().rss
    for child in process.children(recursive=True):
        with suppress(psutil.NoSuchProcess):  # a data worker may end between being listed and being read
            rss += child.memory_info().rss
    return rss


def peak_rss_bytes(proc_status: str) -> int:
    """Return this process's peak resident memory, given the text of its `/proc/self/status`.

    NOTE: `getrusage` is only the way out for kernels without VmHWM: its figure survives `exec`, so a run that was
    launched by a larger process would report its parent's peak.
    """
    for line in proc_status.splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # KiB on Linux


class MemoryMonitor(Callback):
    """Log GPU and host memory at every optimizer step.

    `memory/gpu_peak_gib` is the peak of that step alone, `memory/gpu_used_gib` the whole device's use with all other
    processes, as nvidia-smi shows it; `memory/host_rss_gib` is this process and its children, refreshed once a second,
    and `memory/host_peak_gib` the most that was seen of it or of this process alone. With several devices the scalars
    are those of the first one; the peaks in the run's summary are the largest of all.
    """

    def __init__(self) -> None:
        self.gpu_peak_gib = 0.0
        self.host_peak_gib = 0.0
        self.clock: Callable[[], float] = time.monotonic
        self._host_rss_gib = 0.0
        self._host_measured_at = float("-inf")
        self._step_begins = True

    @property
    def peak_gib(self) -> float:
        """The run's peak so far, with model loading, validation and samples: of the GPU, or of the host without one."""
        return self.gpu_peak_gib or self.host_peak_gib

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self._step_begins:
            self._step_begins = False
            self._begin_step(trainer.strategy.root_device)

    @override
    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: STEP_OUTPUT,
        batch: Mapping[str, Any],
        batch_idx: int,
    ) -> None:
        if batch["last_of_step"]:
            self._step_begins = True
            pl_module.log_dict(self.measure(trainer.strategy.root_device))

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        device = trainer.strategy.root_device
        self.measure(device)
        peaks = torch.tensor([self.gpu_peak_gib, self.host_peak_gib], dtype=torch.float64, device=device)
        self.gpu_peak_gib, self.host_peak_gib = trainer.strategy.reduce(peaks, reduce_op="max").tolist()

    def measure(self, device: torch.device) -> dict[str, float]:
        """Measure device and host by metric name, in GiB, and remember the run's peaks."""
        gpu = gpu_memory(device) if device.type == "cuda" else {}
        if self.clock() - self._host_measured_at >= HOST_SECONDS:
            self._host_rss_gib = tree_rss_bytes(psutil.Process()) / GIB
            self._host_measured_at = self.clock()
        own_peak_gib = peak_rss_bytes(Path("/proc/self/status").read_text()) / GIB
        self.gpu_peak_gib = max(self.gpu_peak_gib, gpu.get("memory/gpu_peak_gib", 0.0))
        self.host_peak_gib = max(self.host_peak_gib, self._host_rss_gib, own_peak_gib)
        return {**gpu, "memory/host_rss_gib": self._host_rss_gib, "memory/host_peak_gib": self.host_peak_gib}

    def _begin_step(self, device: torch.device) -> None:
        """Forget the allocator's peak: what came before this step (loading, validation, samples) is the run's alone."""
        if device.type == "cuda":
            self.gpu_peak_gib = max(self.gpu_peak_gib, torch.cuda.max_memory_allocated(device) / GIB)
            torch.cuda.reset_peak_memory_stats(device)
