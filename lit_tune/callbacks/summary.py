"""What a run came to, on one screen: losses, parameters, memory, speed, answers before and after, where it all is."""

from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from lit_tune.callbacks.epoch_summary import readable_duration
from lit_tune.callbacks.memory_report import StepMemory, memory_table
from lit_tune.memory import Footprint

LABEL_WIDTH = 13


@dataclass(frozen=True)
class SampleChange:
    """An answer to the same prompt before and after training."""

    prompt: str
    before: str
    after: str


@dataclass(frozen=True)
class RunSummary:
    """What the table at a run's end shows."""

    name: str
    train_losses: Sequence[float]  # one an epoch
    val_losses: Sequence[float | None]  # likewise; None where no validation was run
    trainable_parameters: int
    total_parameters: int
    seconds: float  # wall time of the run, validation and checkpoints included
    peak_gib: float
    peak_of: str  # "GPU" or "host"
    memory: Sequence[StepMemory]  # of each rank the step with the highest peak
    predicted_memory: Footprint | None  # of a rank's peak
    tokens_per_s: float | None  # over the run; None if it took no step
    samples: Sequence[SampleChange]
    places: Sequence[tuple[str, str]]  # what ("config", "result") and its path
    next_command: str


def print_summary(console: Console, summary: RunSummary) -> None:
    """Print the summary at the width of the console, with nothing cut off.

    Paths and the next command are not folded but left to the terminal to wrap, so that they can be copied.
    """
    console.print(summary_table(summary), soft_wrap=False)
    for what, path in summary.places:
        console.print(Text.assemble((f"{what:<{LABEL_WIDTH}}", "dim"), path), soft_wrap=True)
    console.print(Text.assemble(("\nNext:  ", "bold"), summary.next_command), soft_wrap=True)


def summary_table(summary: RunSummary) -> RenderableType:
    """Lay out what the run came to: its figures, its losses and its answers."""
    parts: list[RenderableType] = [Text(), Text(f"Run {summary.name}", style="bold"), _figures(summary)]
    if summary.train_losses:
        parts += [Text(), _losses(summary)]
    if summary.memory:
        title = "Memory in the step with the highest peak"
        parts += [Text(), memory_table(summary.memory, title=title, predicted=summary.predicted_memory)]
    if summary.samples:
        parts += [Text(), _samples(summary.samples)]
    return Group(*parts, Text())


def _figures(summary: RunSummary) -> RenderableType:
    table = Table(box=None, show_header=False, padding=0, pad_edge=False)
    table.add_column(style="dim", no_wrap=True, width=LABEL_WIDTH)
    table.add_column(overflow="fold")
    table.add_row("parameters", parameters_text(summary.trainable_parameters, summary.total_parameters))
    table.add_row("peak memory", f"{summary.peak_gib:.2f} GiB ({summary.peak_of})")
    if summary.tokens_per_s is not None:
        table.add_row("throughput", f"{summary.tokens_per_s:,.0f} tokens/s")
    table.add_row("time", readable_duration(summary.seconds))
    return table


def parameters_text(trainable: int, total: int) -> str:
    """Return `921,600 of 135,436,608 trainable (0.68 %)`."""
    return f"{trainable:,} of {total:,} trainable ({trainable / total:.2%})".replace("%", " %")


def _losses(summary: RunSummary) -> RenderableType:
    table = Table("epoch", "train loss", "val loss", box=None, pad_edge=False, header_style="bold")
    for column in table.columns:
        column.justify = "right"
    for epoch, (train, val) in enumerate(zip(summary.train_losses, summary.val_losses, strict=True)):
        table.add_row(str(epoch), f"{train:.4f}", "-" if val is None else f"{val:.4f}")
    return table


def _samples(samples: Sequence[SampleChange]) -> RenderableType:
    table = Table("prompt", "before", "after", expand=True, show_lines=True, header_style="bold")
    for column, ratio in zip(table.columns, (2, 3, 3), strict=True):
        column.ratio, column.overflow = ratio, "fold"
    for sample in samples:
        # As Text: an answer with [brackets] is no markup.
        table.add_row(Text(sample.prompt), Text(sample.before.strip()), Text(sample.after.strip()))
    return table
