"""Memory by category, phase and rank: with made-up allocator and tensors, with a real tiny model, and on the host."""

import os
import subprocess
import sys
import weakref
from collections import Counter
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from typing_extensions import override

from lit_tune.callbacks import memory
from lit_tune.callbacks.memory import MemoryMonitor
from lit_tune.callbacks.memory_report import StepMemory
from lit_tune.callbacks.memory_sources import peak_rss_bytes, tree_rss_bytes
from lit_tune.errors import InputError, OutOfMemoryError
from lit_tune.memory import GIB, SavedTensors

from .tiny import FakeClock, TinyLoader, TinyModule, make_trainer

CUDA = torch.device("cuda", 0)


class FakeAllocator:
    """The few figures of `torch.cuda` that the monitor reads, as a GPU with 80 GiB would give them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.allocated = self.peak = 0
        self.highest = 0
        monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: self.allocated)
        monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: self.highest + GIB)
        monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: self.peak)
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (50 * GIB, 80 * GIB))
        monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", self.reset)
        monkeypatch.setattr(torch.cuda, "host_memory_stats", lambda: {"allocated_bytes.current": GIB // 2})

    def reset(self, device: torch.device) -> None:
        self.peak = self.allocated

    def use(self, gib: float) -> None:
        """Allocate on top of what is held, and free it again."""
        self.peak = max(self.peak, self.allocated + int(gib * GIB))
        self.highest = max(self.highest, self.peak)


class FakeRun:
    """Calls the monitor's hooks as a trainer would, and keeps what it logs.

    Its tensors are words ("weights"), whose sizes `holds` sets.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.monitor = MemoryMonitor()
        self.allocator = FakeAllocator(monkeypatch)
        self.logged: dict[str, float] = {}
        self.printed: list[str] = []
        self.counted = 0  # forward passes
        self.sizes: Counter[str] = Counter()
        self.alive: set[str] = set()
        self.module: Any = SimpleNamespace(log_dict=self.logged.update, print=self.printed.append, saved_tensors=None)
        strategy = SimpleNamespace(root_device=CUDA, reduce=lambda tensor, reduce_op: tensor)
        self.trainer: Any = SimpleNamespace(
            strategy=strategy,
            node_rank=0,
            world_size=1,
            optimizers=["optimizer"],
            global_step=0,
            validating=False,
            sanity_checking=False,
            is_global_zero=True,
            log_every_n_steps=1,
            loggers=[SimpleNamespace(log_metrics=lambda figures, step: self.logged.update(figures))],
        )
        run = self

        class Saved:
            def __init__(self, weights: Any) -> None:
                run.counted += 1

            def bytes_on(self, kind: str) -> int:
                return run.sizes["activations"] if kind == "cuda" else 0

        monkeypatch.setattr(memory, "SavedTensors", Saved)
        monkeypatch.setattr(memory, "bytes_by_kind", self._bytes)
        monkeypatch.setattr(memory, "weight_tensors", lambda module: ["weights"])
        monkeypatch.setattr(memory, "gradient_tensors", lambda module: ["gradients"])
        monkeypatch.setattr(memory, "optimizer_tensors", lambda optimizer: ["optimizer"])

    def _bytes(self, tensors: Iterable[str]) -> Counter[str]:
        return Counter({"cuda": sum(self.sizes[name] for name in tensors if name in self.alive)})

    def holds(self, **gib: int) -> None:
        """Say how large each category is, in GiB."""
        self.sizes = Counter({name: size * GIB for name, size in gib.items()})
        self.alive = {"weights"}
        self.begin()

    def begin(self) -> None:
        self.monitor.on_train_start(self.trainer, self.module)

    def micro_batch(
        self, *, forward: float, backward: float, update: float = 0, last_of_step: bool = True, tokens: int = 16
    ) -> None:
        """Go through a micro-batch whose phases use so many GiB; as in Lightning, gradients go between the two."""
        step = self.trainer.global_step
        batch = {"last_of_step": last_of_step, "step": step, "input_ids": torch.zeros(1, tokens)}
        first = self.monitor._step_begins
        hooks = self.trainer, self.module
        self.monitor.on_train_batch_start(*hooks, batch, 0)
        self.allocator.use(forward)
        if first:
            self.alive -= {"gradients"}
        self.monitor.on_before_backward(*hooks, torch.zeros(()))
        self.allocator.use(backward)
        self.alive |= {"gradients"}
        self.monitor.on_after_backward(*hooks)
        if last_of_step:
            self.monitor.on_before_optimizer_step(*hooks, None)  # type: ignore[arg-type]
            self.allocator.use(update)
            self.alive |= {"optimizer"}
            self.trainer.global_step += 1
        self.monitor.on_train_batch_end(*hooks, None, batch, 0)

    def fail_in_forward(self, *, reached: float) -> None:
        batch = {"input_ids": torch.zeros(1, 16)}
        self.monitor.on_train_batch_start(self.trainer, self.module, batch, 0)
        self.allocator.use(reached)
        self.monitor.on_exception(self.trainer, self.module, torch.OutOfMemoryError("CUDA out of memory."))

    def categories(self) -> dict[str, float]:
        """Return what the last step's peak was made of, as it was logged."""
        names = ("weights", "gradients", "optimizer", "activations", "other")
        return {name: self.logged[f"memory/{name}_gib"] for name in names}


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> FakeRun:
    made = FakeRun(monkeypatch)
    made.begin()
    return made


def test_a_peak_belongs_to_its_phase_and_step_and_the_run_keeps_the_largest(run: FakeRun) -> None:
    run.allocator.allocated = 2 * GIB
    run.micro_batch(forward=5, backward=3, last_of_step=False)  # the step's peak may be in any of its micro-batches
    assert not run.logged
    run.micro_batch(forward=1, backward=6, update=4)
    phases = [run.logged[f"memory/peak_{name}_gib"] for name in ("forward", "backward", "optimizer_step")]
    assert phases == [7, 8, 6]
    assert run.logged["memory/gpu_peak_gib"] == 8
    assert run.monitor.largest[0].peak_phase == "backward"

    run.allocator.use(9)  # validation, between two steps
    run.micro_batch(forward=3, backward=1, update=2)
    assert run.logged["memory/gpu_peak_gib"] == 5
    assert run.monitor.peak_gib == 11
    assert run.monitor.largest[0].peak == 8 * GIB


def test_the_gpu_is_told_as_nvidia_smi_does_with_other_processes(run: FakeRun) -> None:
    run.allocator.allocated = 2 * GIB
    run.micro_batch(forward=3, backward=1, update=1)
    gpu = {name: run.logged[f"memory/gpu_{name}_gib"] for name in ("allocated", "peak", "reserved", "used", "total")}
    assert gpu == {"allocated": 2, "peak": 5, "reserved": 6, "used": 30, "total": 80}
    assert run.logged["memory/host_pinned_gib"] == 0.5


def test_a_peak_is_made_of_what_there_is_in_its_phase(run: FakeRun) -> None:
    """4 GiB of weights, 1 of gradients, 2 of Adam from the second step on, 3 saved by autograd, and the rest."""
    run.holds(weights=4, gradients=1, optimizer=2, activations=3)
    run.micro_batch(forward=7.5, backward=7, update=6)
    assert run.categories() == {"weights": 4, "gradients": 0, "optimizer": 0, "activations": 3, "other": 0.5}
    # Now the last step's gradients are alive in the forward pass, and gone as the backward pass begins.
    run.micro_batch(forward=10.25, backward=9.5, update=7)
    assert run.categories() == {"weights": 4, "gradients": 1, "optimizer": 2, "activations": 3, "other": 0.25}
    run.micro_batch(forward=9, backward=9.5, update=7)
    assert run.categories() == {"weights": 4, "gradients": 0, "optimizer": 2, "activations": 3, "other": 0.5}
    run.micro_batch(forward=6, backward=6, update=7.5)
    assert run.categories() == {"weights": 4, "gradients": 1, "optimizer": 2, "activations": 0, "other": 0.5}


def test_at_the_end_of_a_backward_pass_gradients_may_outweigh_activations(run: FakeRun) -> None:
    run.holds(weights=4, gradients=4, optimizer=0, activations=1)
    run.micro_batch(forward=5, backward=9, update=8)
    assert run.categories() == {"weights": 4, "gradients": 4, "optimizer": 0, "activations": 0, "other": 1}


def test_earlier_micro_batches_leave_gradients_for_the_next_backward_pass(run: FakeRun) -> None:
    run.holds(weights=4, gradients=1, optimizer=0, activations=3)
    run.micro_batch(forward=7, backward=7, last_of_step=False)
    run.micro_batch(forward=8, backward=8.5, update=6)
    assert run.categories() == {"weights": 4, "gradients": 1, "optimizer": 0, "activations": 3, "other": 0.5}


def test_a_step_that_is_not_counted_has_the_last_figures_and_no_more_than_its_peak(run: FakeRun) -> None:
    run.holds(weights=4, gradients=1, optimizer=0, activations=3)
    for _ in range(3):
        run.micro_batch(forward=8, backward=8, update=6)
    assert run.counted == 2  # the first two steps
    run.micro_batch(forward=8, backward=9, update=6)
    assert run.categories()["other"] == 2  # 9 - 4 - 3
    run.micro_batch(forward=5, backward=6, update=5)
    assert run.categories() == {"weights": 4, "gradients": 0, "optimizer": 0, "activations": 2, "other": 0}
    run.micro_batch(forward=8, backward=8, update=6, tokens=17)
    assert run.counted == 3  # more tokens than ever before
    for _ in range(5):
        run.micro_batch(forward=8, backward=8, update=6, tokens=17)
    assert run.counted == 4  # the eleventh step


def test_a_step_that_is_counted_owes_nothing_to_earlier_ones(run: FakeRun) -> None:
    run.holds(weights=4, gradients=1, optimizer=0, activations=3)
    run.micro_batch(forward=8, backward=7, update=6)
    run.sizes["activations"] = GIB
    run.micro_batch(forward=8, backward=7, update=6)
    assert run.categories() == {"weights": 4, "gradients": 1, "optimizer": 0, "activations": 1, "other": 2}


def test_every_rank_and_all_together_are_logged(run: FakeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    run.holds(weights=4, gradients=1, optimizer=0, activations=1)
    gathered: list[list[int]] = []

    def with_another(trainer: Any, numbers: list[int]) -> list[list[int]]:
        if len(numbers) == 2:  # the machine and the process
            return [numbers, [1, 77]]
        other = replace(StepMemory.of(numbers), phases=(9 * GIB, 0, 0), rss=3 * GIB)
        gathered.append(numbers)
        return [numbers, other.numbers()]

    monkeypatch.setattr(memory, "_of_all_ranks", with_another)
    run.begin()
    run.micro_batch(forward=5, backward=6, update=5)
    assert run.logged["memory/rank0/peak_gib"] == run.logged["memory/gpu_peak_gib"] == 6
    assert run.logged["memory/rank1/peak_gib"] == 9
    assert run.logged["memory/all_ranks/peak_gib"] == 15
    assert run.logged["memory/all_ranks/weights_gib"] == 8
    assert run.logged["memory/rank1/host_rss_gib"] == 3
    assert run.logged["memory/host_rss_gib"] == pytest.approx(3 + run.logged["memory/rank0/host_rss_gib"])
    assert [rank.peak for rank in run.monitor.largest] == [6 * GIB, 9 * GIB]
    assert run.monitor.peak_gib == 9
    assert "peaks by rank: 6.00 GiB, 9.00 GiB; 15.00 GiB in all" in run.printed[0]


def test_figures_come_through_as_numbers() -> None:
    numbers = list(range(1, 27))
    assert StepMemory.of(numbers).numbers() == numbers
    assert len(fields(StepMemory)) == 12


# What is counted ------------------------------------------------------------------------------------------------------


class Counted(TinyModule):
    """The tiny module with a place where the tensors that autograd saves are counted, and its own account of them."""

    def __init__(self) -> None:
        super().__init__()
        self.saved_tensors: SavedTensors | None = None
        self.by_hand: list[int] = []  # bytes that autograd saved, weights left out

    @override
    def training_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, torch.Tensor]:
        weights = {weight.untyped_storage().data_ptr() for weight in self.parameters()}
        found: dict[int, torch.Tensor] = {}  # holding the tensors, no address comes again

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            found[tensor.untyped_storage().data_ptr()] = tensor
            return tensor

        inner = self.saved_tensors.counting() if self.saved_tensors else nullcontext()
        with saved_tensors_hooks(keep, lambda tensor: tensor):
            nll = self.nll_sum(batch)
        with inner:
            again = self.nll_sum(batch)
        self.by_hand.append(sum(t.untyped_storage().nbytes() for at, t in found.items() if at not in weights))
        return {"loss": 0 * nll + again / batch["step_supervised"], "nll_sum": nll.detach()}

    @override
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def test_weights_gradients_adam_and_activations_are_counted_to_the_byte(tmp_path: Path) -> None:
    monitor, module = MemoryMonitor(), Counted()
    make_trainer(tmp_path, [monitor]).fit(module, TinyLoader([8, 40, 8]))
    weights = sum(weight.numel() * 4 for weight in module.parameters())
    buffers = sum(buffer.numel() * 4 for buffer in module.buffers())
    one_step_each = 4 * len(list(module.parameters()))
    (step,) = monitor.largest
    most = step.most
    assert (most.weights, most.gradients) == (weights + buffers, weights)
    assert most.optimizer == 2 * weights + one_step_each
    assert monitor._made.activations["cpu"] == max(module.by_hand) == module.by_hand[1]
    assert module.saved_tensors is None
    assert step.device == step.host
    assert step.device.total == step.peak
    assert step.device.other > 50 * 2**20  # Python and torch


def test_counting_holds_nothing_that_would_otherwise_go() -> None:
    saved = SavedTensors()
    with saved.counting():
        root = torch.ones(256, requires_grad=True)
        output = root.exp()  # its backward pass needs the output
    there = weakref.ref(output)
    assert saved.bytes_on("cpu") == 1024
    del output
    assert there() is None


def test_without_a_place_to_count_in_activations_are_part_of_other(tmp_path: Path) -> None:
    monitor = MemoryMonitor()
    make_trainer(tmp_path, [monitor]).fit(TinyModule(), TinyLoader([8, 8]))
    assert monitor.largest[0].most.activations == 0


# Too much of it -------------------------------------------------------------------------------------------------------


def test_what_was_allocated_when_memory_ran_out_is_kept(run: FakeRun) -> None:
    run.holds(weights=4, gradients=1, optimizer=2, activations=3)
    for _ in range(2):
        run.micro_batch(forward=10, backward=9, update=7)
    run.fail_in_forward(reached=11)
    failed = run.monitor.failed
    assert failed is not None
    assert run.monitor.failed_in == "forward pass of optimizer step 2"
    assert failed.peak == 11 * GIB
    held = {name: size / GIB for name, size in vars(failed.device).items()}
    assert held == {"weights": 4, "gradients": 1, "optimizer": 2, "activations": 3, "other": 1}


def test_other_faults_are_left_alone(run: FakeRun) -> None:
    run.monitor.on_exception(run.trainer, run.module, RuntimeError("a bug"))
    assert run.monitor.failed is None


def test_machines_are_limited_one_by_one(run: FakeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of three ranks two share a machine: together they take more than it allows."""
    run.monitor.host_limit_gib = 5.5
    saved: list[Any] = []
    run.monitor.bind(save=saved.append)
    sizes = [2, 4, 3]

    def of_three(trainer: Any, numbers: list[int]) -> list[list[int]]:
        if len(numbers) == 2:
            return [[0, 1], [1, 1], [0, 2]]
        return [replace(StepMemory.of(numbers), rss=size * GIB).numbers() for size in sizes]

    monkeypatch.setattr(memory, "_of_all_ranks", of_three)
    run.begin()
    run.micro_batch(forward=1, backward=1, update=1)
    run.micro_batch(forward=1, backward=1, update=1)
    sizes[2] = 4
    run.micro_batch(forward=1, backward=1, update=1)
    assert not saved
    said = r"takes 6\.00 GiB of host memory after optimizer step 2, more than memory\.host_limit_gib 5\.5"
    with pytest.raises(OutOfMemoryError, match=said):
        run.micro_batch(forward=1, backward=1, update=1)
    assert saved == [run.trainer]


def test_a_limit_of_nothing_is_refused() -> None:
    with pytest.raises(InputError, match=r"memory\.host_limit_gib is 0; it must be more than 0"):
        MemoryMonitor(host_limit_gib=0)


# The host -------------------------------------------------------------------------------------------------------------


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


def test_peak_of_a_stretch_is_that_stretchs(tmp_path: Path) -> None:
    """In a process of its own: the kernel's peak is that of its whole life."""
    script = """
import mmap
from lit_tune.callbacks.memory_sources import ResidentPeak
MIB = 2**20
def take(mib):
    held = mmap.mmap(-1, mib * MIB)  # goes back to the system at once
    held.write(b"x" * (mib * MIB))
    held.close()
source = ResidentPeak()
base = source.peak()
take(300); first = source.peak()
source.begin(); quiet = source.peak()
take(600); larger = source.peak()
print(*((each - base) // MIB for each in (first, quiet, larger)))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    first, quiet, larger = map(int, done.stdout.split())
    assert 300 <= first < 620  # the bytes that are written may be there twice
    assert quiet < 100
    assert larger >= 600


def test_children_of_other_ranks_do_not_count() -> None:
    holds = "import sys; held = bytearray(b'x') * 100 * 2**20; print(flush=True); sys.stdin.read()"
    grandchild = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {holds!r}])"
    child = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {grandchild!r}])"
    started = subprocess.Popen([sys.executable, "-c", child], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert started.stdout is not None
        started.stdout.readline()
        own = psutil.Process()
        difference = tree_rss_bytes(own) - tree_rss_bytes(own, without=[started.pid])
        assert difference > 100 * 2**20
    finally:
        started.communicate()


def test_children_are_looked_for_once_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[psutil.Process] = []

    def tree_rss(process: psutil.Process, *, without: Any) -> int:
        seen.append(process)
        return 5 * GIB

    monkeypatch.setattr(memory, "tree_rss_bytes", tree_rss)
    monitor, clock = MemoryMonitor(), FakeClock()
    monitor.clock = clock
    for seconds in (0.0, 0.4, 0.4, 0.4):
        clock.now += seconds
        step = monitor.measure(torch.device("cpu"), step=0)
    assert len(seen) == 2
    assert step.rss == 5 * GIB
    assert monitor.host_peak_gib == 5.0


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
def test_real_gpu_peak_is_known_to_its_parts_and_falls_after_a_large_step(tmp_path: Path) -> None:
    monitor, module = MemoryMonitor(), Counted()
    peaks: list[StepMemory] = []
    trainer = make_trainer(tmp_path, [monitor], accelerator="gpu")
    original = monitor.measure

    def measure(device: torch.device, *, step: int) -> StepMemory:
        peaks.append(original(device, step=step))
        return peaks[-1]

    monitor.measure = measure  # type: ignore[method-assign]
    trainer.fit(module, TinyLoader([8, 120, 8]))
    assert peaks[2].peak < peaks[1].peak
    assert monitor.gpu_peak_gib >= peaks[1].peak / GIB
    assert peaks[0].most.weights >= sum(weight.numel() * 4 for weight in module.parameters())
    assert peaks[1].device.activations > 0
    assert peaks[1].device.total == peaks[1].peak
