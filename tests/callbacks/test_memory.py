import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch

from lit_tune.callbacks.memory import GIB, MemoryMonitor, gpu_memory, peak_rss_bytes, tree_rss_bytes

from .tiny import FakeClock, TinyLoader, TinyModule, make_trainer

CUDA = torch.device("cuda", 0)


class FakeAllocator:
    """The few figures of `torch.cuda` that the monitor reads, as a GPU with 80 GiB would give them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.allocated = self.peak = 0
        monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: self.allocated)
        monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: self.peak + GIB)
        monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: self.peak)
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (50 * GIB, 80 * GIB))
        monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", self.reset)

    def reset(self, device: torch.device) -> None:
        self.peak = self.allocated

    def use(self, gib: int) -> None:
        """Allocate on top of what is held, and free it again."""
        self.peak = max(self.peak, self.allocated + gib * GIB)


class FakeRun:
    """Calls the monitor's hooks as a trainer would, and keeps what it logs."""

    def __init__(self, monitor: MemoryMonitor) -> None:
        self.monitor = monitor
        self.logged: dict[str, float] = {}
        self.module: Any = SimpleNamespace(log_dict=self.logged.update)
        strategy = SimpleNamespace(root_device=CUDA, reduce=lambda tensor, reduce_op: tensor)
        self.trainer: Any = SimpleNamespace(strategy=strategy)

    def micro_batch(self, allocator: FakeAllocator, gib: int, *, last_of_step: bool) -> None:
        batch = {"last_of_step": last_of_step}
        self.monitor.on_train_batch_start(self.trainer, self.module, batch, 0)
        allocator.use(gib)
        self.monitor.on_train_batch_end(self.trainer, self.module, None, batch, 0)


def test_gpu_memory_is_in_gib_and_counts_other_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    allocator = FakeAllocator(monkeypatch)
    allocator.allocated = 2 * GIB
    allocator.use(3)
    assert gpu_memory(CUDA) == {
        "memory/gpu_allocated_gib": 2.0,
        "memory/gpu_reserved_gib": 6.0,
        "memory/gpu_peak_gib": 5.0,
        "memory/gpu_used_gib": 30.0,
        "memory/gpu_total_gib": 80.0,
    }


def test_a_peak_belongs_to_its_optimizer_step_and_the_run_keeps_the_largest(monkeypatch: pytest.MonkeyPatch) -> None:
    allocator = FakeAllocator(monkeypatch)
    monitor = MemoryMonitor()
    run = FakeRun(monitor)

    run.micro_batch(allocator, 7, last_of_step=False)  # the step's peak may lie in any of its micro-batches
    assert not run.logged
    run.micro_batch(allocator, 4, last_of_step=True)
    assert run.logged["memory/gpu_peak_gib"] == 7.0

    allocator.use(9)  # validation, between two steps
    run.micro_batch(allocator, 3, last_of_step=True)
    assert run.logged["memory/gpu_peak_gib"] == 3.0
    assert monitor.peak_gib == 9.0


def test_the_largest_rank_gives_the_peak_of_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    allocator = FakeAllocator(monkeypatch)
    monitor = MemoryMonitor()
    run = FakeRun(monitor)
    other_rank = torch.tensor([11.0, 0.5], dtype=torch.float64)
    run.trainer.strategy.root_device = torch.device("cpu")
    run.trainer.strategy.reduce = lambda tensor, reduce_op: torch.maximum(tensor, other_rank)
    allocator.use(3)
    monitor.on_train_end(run.trainer, run.module)
    assert monitor.gpu_peak_gib == 11.0


def test_host_memory_counts_children() -> None:
    hold = "import sys; held = bytearray(b'x') * 200 * 2**20; print(flush=True); sys.stdin.read()"
    before = tree_rss_bytes(psutil.Process())
    child = subprocess.Popen([sys.executable, "-c", hold], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert child.stdout is not None
        child.stdout.readline()
        # 200 MiB held by the child; this process's own RSS may move by a few MiB meanwhile
        assert tree_rss_bytes(psutil.Process()) - before > 150 * 2**20
    finally:
        child.communicate()


def test_peak_is_that_of_this_process_not_of_the_one_that_started_it() -> None:
    """`getrusage`'s figure survives exec: that of a small process started by a large one is the large one's."""
    held = bytearray(b"x") * (400 * 2**20)
    small = "from pathlib import Path; print(Path('/proc/self/status').read_text())"
    status = subprocess.run([sys.executable, "-c", small], capture_output=True, text=True, check=True).stdout
    own = peak_rss_bytes(Path("/proc/self/status").read_text())
    assert own >= psutil.Process(os.getpid()).memory_info().rss * 0.99  # the kernel's counters lag by some pages
    assert peak_rss_bytes(status) < len(held) < own


def test_peak_without_the_kernels_figure_is_that_of_getrusage() -> None:
    assert peak_rss_bytes("Name:\tpython\n") >= psutil.Process().memory_info().rss * 0.9


def test_children_are_looked_for_once_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[psutil.Process] = []

    def tree_rss(process: psutil.Process) -> int:
        seen.append(process)
        return 5 * GIB

    monkeypatch.setattr("lit_tune.callbacks.memory.tree_rss_bytes", tree_rss)
    monitor, clock = MemoryMonitor(), FakeClock()
    monitor.clock = clock
    for seconds in (0.0, 0.4, 0.4, 0.4):
        clock.now += seconds
        metrics = monitor.measure(torch.device("cpu"))
    assert len(seen) == 2
    assert metrics == {"memory/host_rss_gib": 5.0, "memory/host_peak_gib": 5.0}


def test_harmless_without_gpu_and_logger(tmp_path: Path) -> None:
    monitor = MemoryMonitor()
    trainer = make_trainer(tmp_path, [monitor])
    trainer.fit(TinyModule(), TinyLoader([8, 8]))
    host = float(trainer.callback_metrics["memory/host_peak_gib"])
    assert 0.05 < host < 64  # a Python process with torch
    assert monitor.peak_gib == pytest.approx(host, rel=0.1)
    assert not any(name.startswith("memory/gpu") for name in trainer.callback_metrics)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_real_gpu_peak_falls_after_a_large_step(tmp_path: Path) -> None:
    monitor = MemoryMonitor()
    peaks: list[float] = []
    module = TinyModule()
    trainer = make_trainer(tmp_path, [monitor], accelerator="gpu")
    original = monitor.measure

    def measure(device: torch.device) -> dict[str, float]:
        metrics = original(device)
        peaks.append(metrics["memory/gpu_peak_gib"])
        return metrics

    monitor.measure = measure  # type: ignore[method-assign]
    trainer.fit(module, TinyLoader([8, 120, 8]))
    assert peaks[2] < peaks[1]
    assert monitor.peak_gib >= max(peaks)
