"""What memory a run takes, and what it is made of: each optimizer step by category, phase and rank.

Lightning's `DeviceStatsMonitor` reports the allocator's peak since the process began, which never falls, and host
memory as a percentage of the machine. Here a peak belongs to ONE phase of ONE optimizer step, and the host is the run's
own processes. Weights, gradients and optimizer state are counted by storage, activations are what autograd saved. As
that costs about 2 us a tensor it is done in the first two steps (Adam's state is there from the second on), in every
tenth, and in a micro-batch larger than any before; between them the last figures stand. What it costs in all, under
2 % of a step, `benchmarks/memory_callback.py` measures.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import astuple
from typing import Any

import psutil
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from lit_tune.callbacks.memory_report import PHASES, StepMemory, made_of, memory_table, metrics, plain_text
from lit_tune.callbacks.memory_sources import (
    PROC_STATUS,
    AllocatorPeak,
    PeakSource,
    ResidentPeak,
    gpu_bytes,
    peak_rss_bytes,
    pinned_bytes,
    tree_rss_bytes,
)
from lit_tune.errors import InputError, OutOfMemoryError, is_out_of_memory
from lit_tune.memory import (
    GIB,
    Footprint,
    SavedTensors,
    bytes_by_kind,
    gradient_tensors,
    optimizer_tensors,
    weight_tensors,
)

HOST_SECONDS = 1.0  # finding the child processes means walking /proc: dear on a machine with thousands of them
COUNTED_EVERY = 10
HOST = "cpu"
FORWARD, BACKWARD, UPDATE = PHASES

Bytes = Counter[str]  # by kind of device: cuda, cpu


class Composition:
    """What a step's memory is known to be made of in each phase, on each kind of device."""

    def __init__(self) -> None:
        self.weights: Bytes = Counter()
        self.optimizer: Bytes = Counter()
        self.activations: Bytes = Counter()  # of the micro-batch that was counted last
        self._most: dict[tuple[str, str], Footprint] = {}

    def forget(self) -> None:
        """Begin with a step anew; weights and optimizer state stay."""
        self._most = {}

    def note(self, phase: str, *, gradients: Bytes, activations: Bytes) -> None:
        """Take what there is at one moment of a phase; of its moments the largest stands."""
        for kind in {*self.weights, *self.optimizer, *gradients, *activations}:
            there = Footprint(self.weights[kind], gradients[kind], self.optimizer[kind], activations[kind])
            if there.total > self.at(phase, kind).total:
                self._most[phase, kind] = there

    def at(self, phase: str, kind: str) -> Footprint:
        """Return the largest of a phase."""
        return self._most.get((phase, kind), Footprint())

    def most(self, kind: str) -> Footprint:
        """Return each category at its largest, as far as it was part of what stands."""
        there = [astuple(self.at(phase, kind)) for phase in PHASES]
        return Footprint(*(max(sizes) for sizes in zip(*there, strict=True)))


class MemoryMonitor(Callback):
    """Log what memory every optimizer step takes by category, and end the run before the host has none left.

    `memory/gpu_peak_gib` is the peak of that step alone, `memory/gpu_used_gib` the whole device's use with all other
    processes, as nvidia-smi shows it; `memory/host_rss_gib` is the host memory of all ranks and their children,
    refreshed once a second, and `memory/host_peak_gib` the most that was seen of it or of this process alone. The
    categories (`memory/weights_gib`, ...) are those of the step's peak, on the GPU or without one on the host. With
    several devices they are the first one's; each one's peak is `memory/rank<i>/peak_gib`.

    Args:
        host_limit_gib: End the run, with a checkpoint and exit code 3, when its processes on a machine take more host
            memory than this; looked at once a second, between two optimizer steps.
        predict: Predict the peak before the run, to stand beside what is measured; takes a second or two.
    """

    def __init__(self, host_limit_gib: float | None = None, predict: bool = True) -> None:
        if host_limit_gib is not None and host_limit_gib <= 0:
            raise InputError(f"memory.host_limit_gib is {host_limit_gib}; it must be more than 0.")
        self.host_limit_gib = host_limit_gib
        self.predict = predict
        self.predicted: Footprint | None = None  # of a rank's peak, where the run knows one
        self.gpu_peak_gib = 0.0
        self.host_peak_gib = 0.0
        self.largest: list[StepMemory] = []  # of each rank the step with the highest peak
        self.failed: StepMemory | None = None  # what there was when memory ran out
        self.failed_in = ""
        self.clock: Callable[[], float] = time.monotonic
        self._save: Callable[[Trainer], None] | None = None
        self._ranks: list[tuple[int, int]] = []  # the machine and the process of each
        self._rss = 0
        self._rss_measured_at = float("-inf")
        self._over_limit_gib: float | None = None
        self._sources: dict[str, PeakSource] = {}  # by kind of device
        self._peaks: dict[str, Bytes] = {}  # of the step, by phase
        self._phase: str | None = None
        self._made = Composition()
        self._gradients: Bytes = Counter()  # that were counted last
        self._steps_begun = 0  # by this process
        self.most_tokens = 0  # of a micro-batch of this rank
        self._counts_step = self._counts_batch = False
        self._step_begins = True

    def bind(self, *, save: Callable[[Trainer], None]) -> None:
        """Take what saves a checkpoint between two steps."""
        self._save = save

    @property
    def peak_gib(self) -> float:
        """The run's peak so far, with model loading, validation and samples: of the GPU, or of the host without one."""
        return self.gpu_peak_gib or self.host_peak_gib

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._sources = _sources(trainer.strategy.root_device)
        self._made.weights = bytes_by_kind(weight_tensors(pl_module))
        self._ranks = [(node, process) for node, process in _of_all_ranks(trainer, [trainer.node_rank, os.getpid()])]

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self._step_begins:
            self._end_over_limit(trainer)
            self._begin_step(trainer.strategy.root_device)
        tokens = batch["input_ids"].numel()
        self._counts_batch = self._counts_step or tokens > self.most_tokens
        self.most_tokens = max(self.most_tokens, tokens)
        if self._counts_batch:
            self._begin_counting(trainer, pl_module)
        self._enter(FORWARD)

    @override
    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        if self._counts_batch:
            self._count_forward(pl_module)
        self._enter(BACKWARD)

    @override
    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._enter(UPDATE)

    @override
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        if self._counts_batch:
            self._gradients = bytes_by_kind(gradient_tensors(pl_module))
            self._made.note(BACKWARD, gradients=self._gradients, activations=Counter())  # all saved tensors are gone

    @override
    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: STEP_OUTPUT,
        batch: Mapping[str, Any],
        batch_idx: int,
    ) -> None:
        if not batch["last_of_step"]:
            self._phase = None  # no update follows this backward pass
            return
        self._enter(None)
        if self._counts_batch:
            self._made.optimizer = _optimizer_bytes(trainer)
            self._made.note(UPDATE, gradients=self._gradients, activations=Counter())
        own = self.measure(trainer.strategy.root_device, step=batch["step"])
        ranks = [StepMemory.of(numbers) for numbers in _of_all_ranks(trainer, own.numbers())]
        self._end_step(trainer, pl_module, ranks)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        device = trainer.strategy.root_device
        self._remember_gpu_peak(device)
        self.measure(device, step=trainer.global_step)
        peaks = torch.tensor([self.gpu_peak_gib, self.host_peak_gib], dtype=torch.float64, device=device)
        self.gpu_peak_gib, self.host_peak_gib = trainer.strategy.reduce(peaks, reduce_op="max").tolist()

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if is_out_of_memory(exception):
            self.failed_in = self._place(trainer)
            failed = self._measure_failure(trainer, pl_module)
            self.failed = failed.of_host() if self._over_limit_gib is not None else failed

    def measure(self, device: torch.device, *, step: int) -> StepMemory:
        """Measure device and host, and remember the run's peaks."""
        if self.clock() - self._rss_measured_at >= HOST_SECONDS:
            others = {process for _, process in self._ranks} - {os.getpid()}
            self._rss = tree_rss_bytes(psutil.Process(), without=others)
            self._rss_measured_at = self.clock()
        own_peak = peak_rss_bytes(PROC_STATUS.read_text())
        self.host_peak_gib = max(self.host_peak_gib, self._rss / GIB, own_peak / GIB)
        on_gpu = device.type == "cuda"
        kind = device.type if on_gpu else HOST
        forward, backward, update = (self._peaks.get(phase, Counter())[kind] for phase in PHASES)
        return StepMemory(
            step=step,
            phases=(forward, backward, update),
            device=self._at_peak(kind),
            most=self._made.most(kind),
            host=self._at_peak(HOST),
            rss=self._rss,
            rss_peak=own_peak,
            **({**gpu_bytes(device), "pinned": pinned_bytes()} if on_gpu else {}),
        )

    def _at_peak(self, kind: str) -> Footprint:
        """Return what a kind of memory was made of at the step's peak."""
        peaks = {phase: self._peaks.get(phase, Counter())[kind] for phase in PHASES}
        phase = max(PHASES, key=lambda phase: peaks[phase])
        return made_of(self._made.at(phase, kind), peaks[phase])

    # -- an optimizer step -------------------------------------------------------------------------------------------

    def _begin_step(self, device: torch.device) -> None:
        self._remember_gpu_peak(device)
        self._step_begins = False
        self._counts_step = self._steps_begun < 2 or self._steps_begun % COUNTED_EVERY == 0
        self._steps_begun += 1
        self._peaks = {}
        if self._counts_step:
            self._made.forget()

    def _enter(self, phase: str | None) -> None:
        """End the phase under way and begin another, None for whatever is between two steps."""
        for kind, source in self._sources.items():
            if self._phase is not None:
                reached = self._peaks.setdefault(self._phase, Counter())
                reached[kind] = max(reached[kind], source.peak())
            source.begin()
        self._phase = phase

    def _begin_counting(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # NOTE: Lightning lets go of the gradients between forward and backward, so the last step's are still there.
        self._gradients = bytes_by_kind(gradient_tensors(pl_module))
        self._made.optimizer = _optimizer_bytes(trainer)
        if hasattr(pl_module, "saved_tensors"):
            _set_saved_tensors(pl_module, SavedTensors(weight_tensors(pl_module)))

    def _count_forward(self, pl_module: LightningModule) -> None:
        """Take what autograd has saved; where the module has no place for counting, activations stay in `other`."""
        saved: SavedTensors | None = getattr(pl_module, "saved_tensors", None)
        if saved is not None:
            self._made.activations = _saved_bytes(saved)
            _set_saved_tensors(pl_module, None)
        self._made.note(FORWARD, gradients=self._gradients, activations=self._made.activations)
        left = bytes_by_kind(gradient_tensors(pl_module))  # of the step's earlier micro-batches
        self._made.note(BACKWARD, gradients=left, activations=self._made.activations)

    def _end_step(self, trainer: Trainer, pl_module: LightningModule, ranks: list[StepMemory]) -> None:
        """Log a step of all ranks, and keep each one's if it is the largest."""
        self._step_begins = True
        first = not self.largest
        if first:
            self.largest = ranks
        self.largest = [max(pair, key=lambda rank: rank.peak) for pair in zip(self.largest, ranks, strict=True)]
        self.gpu_peak_gib = max(self.gpu_peak_gib, *(rank.peak / GIB for rank in ranks if rank.on_gpu), 0.0)
        self.host_peak_gib = max(self.host_peak_gib, sum(rank.rss for rank in ranks) / GIB)
        self._look_at_limit(ranks)
        self._log(trainer, pl_module, metrics(ranks))
        if first:
            title = f"Memory in the first step (optimizer step {ranks[0].step})"
            pl_module.print(plain_text(memory_table(ranks, title=title, predicted=self.predicted)))

    def _log(self, trainer: Trainer, pl_module: LightningModule, figures: dict[str, float]) -> None:
        """Give the peaks to Lightning, for whoever shows them; all else goes to the loggers without it."""
        peaks = {"memory/host_peak_gib": self.host_peak_gib}
        if "memory/gpu_peak_gib" in figures:
            peaks["memory/gpu_peak_gib"] = figures.pop("memory/gpu_peak_gib")
        pl_module.log_dict(peaks)
        # NOTE: Lightning's `log` takes 0.2 ms a figure, and there are up to thirty of them.
        every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]  # Lightning sets it undeclared; 0 is never
        if trainer.is_global_zero and every and trainer.global_step % every == 0:
            for logger in trainer.loggers:
                logger.log_metrics(figures, step=trainer.global_step - 1)

    def _remember_gpu_peak(self, device: torch.device) -> None:
        """Take what came before this step (loading, validation, samples), which is the run's alone."""
        if device.type == "cuda":
            self.gpu_peak_gib = max(self.gpu_peak_gib, torch.cuda.max_memory_allocated(device) / GIB)

    # -- too much of it ----------------------------------------------------------------------------------------------

    def _look_at_limit(self, ranks: list[StepMemory]) -> None:
        """Note whether the ranks on any machine take more than they may together: all ranks come to the same answer."""
        machines: Counter[int] = Counter()
        for (node, _), rank in zip(self._ranks, ranks, strict=True):
            machines[node] += rank.rss
        most_gib = max(machines.values()) / GIB
        if self.host_limit_gib is not None and most_gib > self.host_limit_gib:
            self._over_limit_gib = most_gib

    def _end_over_limit(self, trainer: Trainer) -> None:
        if self._over_limit_gib is not None:
            if self._save is not None:
                self._save(trainer)
            raise OutOfMemoryError(
                f"the run takes {self._over_limit_gib:.2f} GiB of host memory after optimizer step "
                f"{trainer.global_step - 1}, more than memory.host_limit_gib {self.host_limit_gib:g}",
                on_all_ranks=True,
            )

    def _place(self, trainer: Trainer) -> str:
        """Say what the run was at."""
        if trainer.validating or trainer.sanity_checking:
            return "validation"
        if not self._steps_begun:
            return "start, before the first step"
        at = {FORWARD: "forward pass of", BACKWARD: "backward pass of", UPDATE: "update of", None: "pause before"}
        return f"{at[self._phase]} optimizer step {trainer.global_step}"

    def _measure_failure(self, trainer: Trainer, pl_module: LightningModule) -> StepMemory:
        """Count what there is now; of activations what autograd had saved, else as many as at last."""
        saved: SavedTensors | None = getattr(pl_module, "saved_tensors", None)
        activations = Counter[str]()
        if self._phase in (FORWARD, BACKWARD):
            activations = self._made.activations if saved is None else _saved_bytes(saved)
        phase, self._phase = self._phase or UPDATE, self._phase or UPDATE
        self._sources = self._sources or _sources(trainer.strategy.root_device)
        self._peaks = {}
        self._enter(None)
        self._made.weights = bytes_by_kind(weight_tensors(pl_module))
        self._made.optimizer = _optimizer_bytes(trainer)
        self._made.forget()
        self._made.note(phase, gradients=bytes_by_kind(gradient_tensors(pl_module)), activations=activations)
        self._rss_measured_at = float("-inf")
        return self.measure(trainer.strategy.root_device, step=trainer.global_step)


def _sources(device: torch.device) -> dict[str, PeakSource]:
    sources: dict[str, PeakSource] = {HOST: ResidentPeak()}
    if device.type == "cuda":
        sources[device.type] = AllocatorPeak(device)
    return sources


def _set_saved_tensors(module: Any, saved: SavedTensors | None) -> None:
    module.saved_tensors = saved


def _optimizer_bytes(trainer: Trainer) -> Bytes:
    return bytes_by_kind(tensor for optimizer in trainer.optimizers for tensor in optimizer_tensors(optimizer))


def _saved_bytes(saved: SavedTensors) -> Bytes:
    return Counter({kind: saved.bytes_on(kind) for kind in (HOST, "cuda")})


def _of_all_ranks(trainer: Trainer, numbers: list[int]) -> list[list[int]]:
    """Return the numbers of every rank, which all call this with as many."""
    if trainer.world_size == 1:
        return [numbers]
    own = torch.tensor(numbers, device=trainer.strategy.root_device)
    gathered = [torch.empty_like(own) for _ in range(trainer.world_size)]
    torch.distributed.all_gather(gathered, own)
    return [each.tolist() for each in gathered]
