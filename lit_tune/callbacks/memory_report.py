"""The memory of an optimizer step in figures: which there are, by what names they are logged, and their table."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import astuple, dataclass, fields, replace
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from lit_tune.memory import GIB, Footprint

PHASES = ("forward", "backward", "optimizer step")
MIB = 1024**2
NARROW = 80


@dataclass(frozen=True)
class StepMemory:
    """What a rank's optimizer step took, in bytes.

    Args:
        step: The optimizer step, counted from 0.
        phases: The peak in each of `PHASES`: of the allocator, or without a GPU of the process's resident memory.
        device: What the highest of them was made of, on the GPU or without one in host memory.
        most: The largest that each category was on the device at any time in the step; `other` is not known.
        host: What the process's highest resident memory in the step was made of; without a GPU the same.
        rss: Resident memory of the process and its children, other ranks left out.
        rss_peak: The process's own peak since its start.
        pinned: Host memory that torch has pinned for copies to the GPU.
        allocated: What the allocator had given out at the step's end. Without a GPU this and all that follows is 0.
        reserved: What the allocator had taken from the GPU.
        used: All that is taken of the GPU, by other processes too, as nvidia-smi shows it.
        total: The GPU's memory.
    """

    step: int
    phases: tuple[int, int, int]
    device: Footprint
    most: Footprint
    host: Footprint
    rss: int
    rss_peak: int
    pinned: int = 0
    allocated: int = 0
    reserved: int = 0
    used: int = 0
    total: int = 0

    @property
    def peak(self) -> int:
        """The step's peak."""
        return max(self.phases)

    @property
    def peak_phase(self) -> str:
        """Where in the step the peak was."""
        return PHASES[self.phases.index(self.peak)]

    @property
    def on_gpu(self) -> bool:
        """Whether the step was computed on a GPU."""
        return self.total > 0

    def of_host(self) -> StepMemory:
        """Return the figures of the process's host memory alone."""
        return StepMemory(self.step, (0, 0, self.host.total), self.host, self.host, self.host, self.rss, self.rss_peak)

    def numbers(self) -> list[int]:
        """Return all figures as one list, to be sent to other ranks."""
        return [number for part in astuple(self) for number in (part if isinstance(part, tuple) else (part,))]

    @classmethod
    def of(cls, numbers: Sequence[int]) -> StepMemory:
        """Make it again from its numbers."""
        step, forward, backward, update, *rest = numbers
        width = len(fields(Footprint))
        device, most, host = (Footprint(*rest[start : start + width]) for start in range(0, 3 * width, width))
        return cls(step, (forward, backward, update), device, most, host, *rest[3 * width :])

    def record(self) -> dict[str, Any]:
        """Return the figures for `memory.json`."""
        gpu = {name: getattr(self, name) for name in ("allocated", "reserved", "used", "total")}
        return {
            "step": self.step,
            "peak": self.peak,
            "peak_phase": self.peak_phase,
            "phases": dict(zip(PHASES, self.phases, strict=True)),
            "categories": vars(self.device),
            "largest": {name: size for name, size in vars(self.most).items() if name != "other"},
            "gpu": gpu if self.on_gpu else None,
            "host": {
                "rss": self.rss,
                "rss_peak": self.rss_peak,
                "pinned": self.pinned,
                "categories": vars(self.host),
            },
        }


def made_of(known: Footprint, peak: int) -> Footprint:
    """Return what a peak was made of: what is known, and `other`; where more is known, a small step's activations."""
    lasting = known.weights + known.gradients + known.optimizer
    activations = min(known.activations, max(0, peak - lasting))
    return replace(known, activations=activations, other=max(0, peak - lasting - activations))


def together(ranks: Sequence[StepMemory]) -> Footprint:
    """Return what the devices of all ranks hold at their peaks."""
    return sum((rank.device for rank in ranks), start=Footprint())


def metrics(ranks: Sequence[StepMemory]) -> dict[str, float]:
    """Return a step's figures by metric name, in GiB: those of rank 0, and with several ranks each one's and the sums.

    Host memory is always that of all ranks.
    """
    first = ranks[0]
    found = {f"memory/{name}": size for name, size in vars(first.device).items()}
    found |= {f"memory/peak_{name.replace(' ', '_')}": size for name, size in zip(PHASES, first.phases, strict=True)}
    found["memory/host_rss"] = sum(rank.rss for rank in ranks)
    if first.on_gpu:
        found |= {f"memory/gpu_{name}": getattr(first, name) for name in ("allocated", "reserved", "used", "total")}
        found |= {f"memory/host_{name}": size for name, size in vars(first.host).items()}
        found |= {"memory/gpu_peak": first.peak, "memory/host_pinned": first.pinned}
    if len(ranks) > 1:
        for number, rank in enumerate(ranks):
            found |= {f"memory/rank{number}/peak": rank.peak, f"memory/rank{number}/host_rss": rank.rss}
        found |= {f"memory/all_ranks/{name}": size for name, size in vars(together(ranks)).items()}
        found["memory/all_ranks/peak"] = sum(rank.peak for rank in ranks)
    return {f"{name}_gib": size / GIB for name, size in found.items()}


# -- the table ---------------------------------------------------------------------------------------------------------


def size_text(size: float) -> str:
    """Return a size as `1.25 GiB`, `12.3 MiB` or `0.1 MiB`."""
    return f"{size / GIB:.2f} GiB" if abs(size) >= GIB else f"{size / MIB:.1f} MiB"


def memory_table(
    ranks: Sequence[StepMemory], *, title: str, predicted: Footprint | None = None, failed: bool = False
) -> RenderableType:
    """Lay out what memory is made of, on the rank where the peak is highest; fits 80 columns.

    Args:
        ranks: A step of each rank.
        title: What the table is of.
        predicted: What was expected of that rank's peak.
        failed: The figures are those of a step that ran out of memory.
    """
    number, largest = max(enumerate(ranks), key=lambda rank: rank[1].peak)
    place = ("GPU" if largest.on_gpu else "host") + (f" of rank {number}" if len(ranks) > 1 else "")
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    table.add_column(place, overflow="fold")
    most_heading = () if failed else ("at most",)
    for heading in (
        "allocated" if failed else "at the peak",
        "share",
        *(("predicted", "off by") if predicted else ()),
        *most_heading,
    ):
        table.add_column(heading, justify="right", overflow="fold")
    for name, size in vars(largest.device).items():
        expected = None if predicted is None else int(getattr(predicted, name))
        most = [] if failed or name == "other" else [size_text(getattr(largest.most, name))]
        table.add_row(name, *_cells(size, expected, of=largest.device.total), *most)
    expected = None if predicted is None else predicted.total
    table.add_row("all", *_cells(largest.device.total, expected, of=largest.device.total), style="bold")
    lines = [] if failed else [Text(f"peaks in GiB: {_phases(largest)}")]
    if largest.on_gpu:
        lines.append(Text(f"reserved {size_text(largest.reserved)}; of the GPU {_used(largest)} in use"))
    lines.append(Text(_host(ranks)))
    if len(ranks) > 1:
        peaks = ", ".join(size_text(rank.peak) for rank in ranks)
        lines.append(Text(f"peaks by rank: {peaks}; {size_text(sum(rank.peak for rank in ranks))} in all"))
    return Group(Text(title, style="bold"), table, *lines)


def _cells(size: int, expected: int | None, *, of: int) -> list[str]:
    share = f"{100 * size / of:.1f} %" if of else ""
    if expected is None:
        return [size_text(size), share]
    difference = f"{100 * (size - expected) / expected:+.1f} %" if expected else ""
    return [size_text(size), share, size_text(expected), difference]


def _phases(memory: StepMemory) -> str:
    highest = memory.peak_phase
    parts = (
        f"{name} {size / GIB:.2f}{' (highest)' if name == highest else ''}"
        for name, size in zip(PHASES, memory.phases, strict=True)
    )
    return ", ".join(parts)


def _used(memory: StepMemory) -> str:
    return f"{memory.used / GIB:.1f} of {memory.total / GIB:.1f} GiB"


def _host(ranks: Sequence[StepMemory]) -> str:
    rss, own = sum(rank.rss for rank in ranks), max(rank.rss_peak for rank in ranks)
    pinned = sum(rank.pinned for rank in ranks)
    text = f"host: {size_text(rss)} with all children, peak of one process {size_text(own)}"
    return f"{text}, {size_text(pinned)} pinned" if pinned else text


def plain_text(what: RenderableType, *, width: int = NARROW) -> str:
    """Return something of Rich's as lines of text."""
    out = io.StringIO()
    Console(file=out, width=width, color_system=None, force_terminal=False).print(what)
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines())
