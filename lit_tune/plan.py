"""`lit-tune plan`: what memory a run takes, before it is started, and what to change where it does not fit."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from lit_tune import techniques
from lit_tune.errors import InputError
from lit_tune.memory import CATEGORIES, GIB
from lit_tune.modules import load
from lit_tune.predict import Case, Device, Prediction, heaviest
from lit_tune.remedies import CONTEXT_GIB, Option, flops_per_token, largest_that_fits, needed_gib, options
from lit_tune.workload import MicroBatch, largest_micro_batches

if TYPE_CHECKING:
    from lit_tune.run import TuneCLI

USUAL_GIB = (8, 12, 16, 24, 32, 40, 48, 80, 96, 141, 180)
MOST_CHANGES = 12


# -- the command -------------------------------------------------------------------------------------------------------


def plan(arguments: list[str]) -> None:
    """Predict memory: takes every setting of `fit`, and --gpu-gib, --tokens, --find-batch."""
    from lit_tune.run import build  # noqa: PLC0415  # imports torch and lightning

    target = Target()
    built = build(
        arguments,
        description="Predict what memory a run takes, without its weights and without a GPU.",
        options=_add_options,
        adjust=target.take,
    )
    settings = built.settings
    if settings["gpu_gib"] is not None and settings["gpu_gib"] <= CONTEXT_GIB:
        raise InputError(
            f"--gpu-gib is {settings['gpu_gib']:g}; it must be more than the {CONTEXT_GIB} of CUDA itself."
        )
    case, found = predicted(built, target, tokens=settings["tokens"])
    free = settings["gpu_gib"] or target.free_gib()
    console = Console(highlight=False)
    if built.datamodule.prepared is None and settings["tokens"] is None:
        console.print("No tokenizer of this base is here: every sample is taken to be data.max_length long.")
    print_plan(console, case, found, free_gib=free, find_batch=settings["find_batch"])


def _add_options(parser: Any) -> None:
    parser.add_argument(
        "--gpu_gib",
        "--gpu-gib",
        type=float | None,
        default=None,
        help="Memory of each GPU in GiB; left out, what is free on the GPU that is here, if one is.",
    )
    parser.add_argument(
        "--tokens",
        type=int | None,
        default=None,
        help="Tokens of a micro-batch, where neither records nor tokenizer are at hand; left out, the largest "
        "micro-batch of the records, or data.micro_batch_size x data.max_length.",
    )
    parser.add_argument(
        "--find_batch",
        "--find-batch",
        type=bool,
        default=False,
        nargs="?",
        const=True,
        help="Find the largest micro-batch that fits, in samples and in tokens.",
    )


class Target:
    """The machine that a run is for; this one need not be like it."""

    def __init__(self) -> None:
        self.device: Device = "cuda"
        self.precision = "bf16-mixed"
        self.devices = 1
        self.strategy = "auto"

    def take(self, settings: Any) -> dict[str, Any]:
        """Take the target from the settings, and leave such that can be made anywhere in their place; return it."""
        from lit_tune.run import default_precision, process_count  # noqa: PLC0415

        trainer = settings["trainer"]
        self.device = "cpu" if trainer["accelerator"] == "cpu" else "cuda"
        default = default_precision("cpu") if self.device == "cpu" else "bf16-mixed"
        precision = str(trainer["precision"] or default)
        self.precision = techniques.PRECISIONS.get(precision, precision)
        self.devices = process_count(trainer["accelerator"], trainer["devices"], trainer["num_nodes"])
        self.strategy = str(trainer["strategy"])
        anywhere = {"accelerator": "cpu", "precision": "32-true", "strategy": "auto", "num_nodes": 1}
        for name, value in (anywhere | {"devices": self.devices}).items():
            trainer[name] = value
        return {
            "device": self.device,
            "devices": self.devices,
            "precision": self.precision,
            "strategy": self.strategy,
        }

    def free_gib(self) -> float | None:
        """Return what is free on the GPU that is here, with what CUDA's context in this process takes."""
        if self.device == "cpu" or not torch.cuda.is_available():
            return None
        free, _ = torch.cuda.mem_get_info()
        return free / GIB + CONTEXT_GIB


# -- what is predicted -------------------------------------------------------------------------------------------------


def predicted(built: TuneCLI, target: Target, *, tokens: int | None) -> tuple[Case, Prediction]:
    """Return what the memory of a run depends on, and what it will be."""
    micros = _micro_batches(built, tokens)
    case = Case(
        tuner=built.model,
        config=load.load_config(built.model.base),
        micro=micros[0],
        precision=target.precision,
        device=target.device,
        accumulate=int(built.trainer.accumulate_grad_batches),
        devices=target.devices,
        strategy=built.strategy_name if target.strategy == "auto" else target.strategy,
        token_budget=built.datamodule.micro_batch_tokens,
    )
    return heaviest(case, micros)


def _micro_batches(built: TuneCLI, tokens: int | None) -> list[MicroBatch]:
    data = built.datamodule
    if tokens is not None:
        if tokens < 2:
            raise InputError(f"--tokens is {tokens}; it must be 2 or more.")
        return [MicroBatch((tokens,), tokens - 1, packed=data.packing)]
    if load.has_tokenizer(built.model.base):
        data.trainer = built.trainer
        data.prepare(built.model.load_tokenizer)
        return largest_micro_batches(data)
    size = data.micro_batch_tokens or data.max_length
    count = 1 if data.micro_batch_tokens else data.cut(world=1, accumulate=1).samples
    assert count is not None
    return [MicroBatch((size,) * count, (size - 1) * count, packed=data.packing)]


# -- the page ----------------------------------------------------------------------------------------------------------


def print_plan(console: Console, case: Case, found: Prediction, *, free_gib: float | None, find_batch: bool) -> None:
    """Print what was predicted, whether it fits, and what to change if it does not.

    Args:
        free_gib: Memory of a GPU; None if it is not known.
        find_batch: Say also which micro-batches fit.
    """
    console.print(_heading(case))
    console.print(_table(found))
    console.print(_figures(case, found))
    if case.device == "cpu":
        return
    needed = needed_gib(found)
    if free_gib is None:
        enough = next((size for size in USUAL_GIB if size >= needed), None)
        more = f"fits on a GPU of {enough} GiB" if enough else f"fits on no GPU of up to {USUAL_GIB[-1]} GiB"
        console.print(f"\n{needed:.2f} GiB with CUDA's own {CONTEXT_GIB}: {more}. With --gpu-gib: what makes it fit.")
        return

    room = int((free_gib - CONTEXT_GIB) * GIB)
    fits = found.peak.total <= room
    verdict, style = ("fits", "green") if fits else ("does NOT fit", "red")
    said = f"\n{needed:.2f} GiB with CUDA's own {CONTEXT_GIB}: {verdict} on a GPU of {free_gib:.2f} GiB."
    console.print(said, style=f"bold {style}")
    if not fits:
        _print_options(console, options(case, found, room))
    if find_batch:
        _print_batches(console, case, room)


def _heading(case: Case) -> str:
    tuner, micro = case.tuner, case.micro
    base = f"{tuner.method} of {tuner.base}" + (f" in {tuner.quantize}" if tuner.quantize != "none" else "")
    where = "GPU" if case.device == "cuda" else "CPU"
    many = f"each of {case.devices} {where}s, {case.strategy}" if case.devices > 1 else f"one {where}"
    samples = f"{len(micro.lengths)} sample{'s' if len(micro.lengths) > 1 else ''}"
    return (
        f"Plan: {base}, {case.precision}, on {many}\n"
        f"Micro-batch: {samples}, {micro.tokens:,} tokens; {case.accumulate} for each optimizer step\n"
    )


def _table(found: Prediction) -> Table:
    table = Table("", "GiB at the peak", "GiB at most", "bytes at most", box=None, pad_edge=False, header_style="bold")
    for column in table.columns[1:]:
        column.justify = "right"
    peak = found.peak
    for category in CATEGORIES[:-1]:
        most = getattr(found, category)
        table.add_row(category, f"{getattr(peak, category) / GIB:.3f}", f"{most / GIB:.3f}", f"{most:,}")
    table.add_row("other", f"{peak.other / GIB:.3f}", "", "")
    table.add_row("all", f"{peak.total / GIB:.3f}", "", "", style="bold")
    return table


def _figures(case: Case, found: Prediction) -> Table:
    table = Table(box=None, show_header=False, pad_edge=False)
    flops = flops_per_token(case, found)
    table.add_row("the peak is", f"in the {found.moment}")
    if found.host:
        table.add_row("in host memory", f"{found.host / GIB:.3f} GiB")
    table.add_row("a checkpoint", _size(found.checkpoint))
    table.add_row(
        "compute", f"{flops / 1e9:,.2f} GFLOP a token, {flops * case.micro.tokens / 1e12:,.2f} TFLOP a micro-batch"
    )
    return table


def _size(size: int) -> str:
    return f"{size / GIB:.2f} GiB" if size >= GIB else f"{size / 1024**2:.1f} MiB"


def _print_options(console: Console, made: list[Option]) -> None:
    if not made:
        console.print("No change that is known here makes it fit: take a smaller model or more GPUs.")
        return
    console.print("\nWhat makes it fit, the cheapest first:")
    table = Table("GiB", "compute", "cost", "add to the command", box=None, pad_edge=False, header_style="bold")
    table.columns[3].overflow = "fold"
    for option in made[:MOST_CHANGES]:
        figures = f"{needed_gib(option.found):.2f}", f"x {option.compute:.2f}"
        table.add_row(*figures, option.cost, Text(option.flags))
    console.print(table)


def _print_batches(console: Console, case: Case, room: int) -> None:
    longest, packed = max(case.micro.lengths), case.micro.packed
    share = case.micro.supervised / case.micro.tokens

    def samples(count: int) -> MicroBatch:
        return MicroBatch((longest,) * count, int(share * longest * count), packed)

    def tokens(count: int) -> MicroBatch:
        return MicroBatch((64,) * count, int(share * 64 * count), packed)

    most = largest_that_fits(case, room, sizes=samples)
    if not most:
        console.print(f"\nNot even a micro-batch of one sample of {longest:,} tokens fits.")
        return
    places = 64 * largest_that_fits(case, room, sizes=tokens)
    console.print(
        f"\nThe largest micro-batch that fits: {most} samples of {longest:,} tokens (--data.micro_batch_size {most}), "
        f"or {places:,} tokens in short samples (--data.micro_batch_tokens {places})."
    )
