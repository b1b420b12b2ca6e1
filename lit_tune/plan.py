"""`lit-tune plan`: what memory a run takes, before it is started, and what to change where it does not fit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from lit_tune import techniques
from lit_tune.errors import InputError
from lit_tune.flops import Matrices, training_flops
from lit_tune.memory import CATEGORIES, GIB
from lit_tune.modules import load
from lit_tune.predict import FSDP2_OFFLOAD, Case, Prediction, heaviest, predict, same_settings
from lit_tune.workload import MicroBatch, largest_micro_batches

if TYPE_CHECKING:
    from lit_tune.run import TuneCLI

# What a process takes of a GPU before its first tensor: the CUDA context and the kernels' code.
CONTEXT_GIB = 0.5
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
    case = case_of(built, target, tokens=settings["tokens"])
    free = settings["gpu_gib"] or target.free_gib()
    console = Console(highlight=False)
    if built.datamodule.prepared is None and settings["tokens"] is None:
        console.print("No tokenizer of this base is here: every sample is taken to be data.max_length long.")
    print_plan(console, case, predict(case), free_gib=free, find_batch=settings["find_batch"])


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
        self.device = "cuda"
        self.precision = "bf16-mixed"
        self.devices = 1
        self.strategy = "auto"

    def take(self, settings: Any) -> dict[str, Any]:
        """Take the target from the settings, and leave such that can be made anywhere in their place; return it."""
        from lit_tune.run import default_precision  # noqa: PLC0415

        trainer = settings["trainer"]
        self.device = "cpu" if trainer["accelerator"] == "cpu" else "cuda"
        default = default_precision("cpu") if self.device == "cpu" else "bf16-mixed"
        precision = str(trainer["precision"] or default)
        self.precision = techniques.PRECISIONS.get(precision, precision)
        self.devices = _count(trainer["devices"]) * int(trainer["num_nodes"])
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


def _count(devices: Any) -> int:
    if isinstance(devices, list):
        return len(devices)
    text = str(devices)
    if "," in text:
        return len([part for part in text.split(",") if part])
    if text.isdigit() and text != "0":
        return int(text)
    return max(1, torch.cuda.device_count())  # auto, -1


# -- what is predicted -------------------------------------------------------------------------------------------------


def case_of(built: TuneCLI, target: Target, *, tokens: int | None) -> Case:
    """Return what the memory of a run depends on."""
    micros = _micro_batches(built, tokens)
    case = Case(
        tuner=built.model,
        config=load.load_config(built.model.base),
        micro=micros[0],
        precision=target.precision,
        device="cpu" if target.device == "cpu" else "cuda",
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


def matrices(case: Case, adapters: int) -> Matrices:
    """Count the weights that take part in matrix products.

    Args:
        adapters: Numbers that train, in LoRA.
    """
    config: Any = case.config.get_text_config()
    width = config.hidden_size
    heads = config.num_attention_heads
    head_width = getattr(config, "head_dim", None) or width // heads
    queries = heads * head_width
    keys = (getattr(config, "num_key_value_heads", None) or heads) * head_width
    return Matrices(
        attention=2 * width * queries + 2 * width * keys,
        mlp=3 * width * config.intermediate_size,
        head=width * config.vocab_size,
        adapters=adapters if case.tuner.method == "lora" else 0,
        layers=config.num_hidden_layers,
        attention_width=queries,
    )


def flops_per_token(case: Case, found: Prediction) -> float:
    """Return the operations that training takes for a token of the micro-batch, see `lit_tune.flops`."""
    lengths, setting = case.micro.lengths, case.tuner.gradient_checkpointing
    layers = case.config.get_text_config().num_hidden_layers
    again = {"full": 1.0}.get(str(setting), 0.0)
    if isinstance(setting, int):
        again = -(-layers // setting) / layers
    return training_flops(
        matrices(case, adapters=found.trained // 4),  # fp32
        frozen=case.tuner.method == "lora",
        context=sum(n * n for n in lengths) / sum(lengths) / 2,
        supervised=case.micro.supervised / case.micro.tokens,
        again=again,
        mlp_again=1.0 if setting == "mlp" else 0.0,
    )


# -- what would make it fit --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Change:
    """A change of settings.

    Args:
        flags: What to add to the command.
        cost: What it costs besides compute, which is told in figures.
        make: Returns the changed case; None where the change is none or cannot be.
    """

    flags: str
    cost: str
    make: Callable[[Case], Case | None]

    def applied(self, case: Case) -> Case | None:
        """Return the changed case; None where nothing changes, or where it would not go together with the rest."""
        made = self.make(case)
        return made if made is not None and can_be(made) else None


@dataclass(frozen=True)
class Option:
    """Changes that were predicted together."""

    flags: str
    cost: str
    case: Case
    found: Prediction


def can_be(case: Case) -> bool:
    """Tell whether the techniques of a case go together."""
    tuner = case.tuner
    choice = techniques.Choice(
        method=tuner.method,
        quantize=tuner.quantize,
        variant=tuner.lora.variant,
        optimizer=tuner.optimizer,
        optimizer_in_backward=tuner.optimizer_in_backward,
        gradient_checkpointing=tuner.gradient_checkpointing,
        skip_nonfinite=tuner.skip_nonfinite,
        precision=case.precision,
        strategy=case.strategy,
        device=case.device,
        devices=case.devices,
        accumulate=case.accumulate,
    )
    return techniques.refusal(choice) is None


def _module(**settings: Any) -> Callable[[Case], Case | None]:
    def make(case: Case) -> Case | None:
        changed = {name: value for name, value in settings.items() if getattr(case.tuner, name) != value}
        return replace(case, tuner=same_settings(case.tuner, **changed)) if changed else None

    return make


def _only(method: str, make: Callable[[Case], Case | None]) -> Callable[[Case], Case | None]:
    return lambda case: make(case) if case.tuner.method == method else None


def _halved(samples: int) -> Callable[[Case], Case | None]:
    def make(case: Case) -> Case | None:
        whole = case.micro
        if samples >= len(whole.lengths):
            return None
        lengths = tuple(sorted(whole.lengths, reverse=True)[:samples])
        supervised = whole.supervised * sum(lengths) // sum(whole.lengths)
        more = case.accumulate * -(-len(whole.lengths) // samples)
        return replace(case, micro=replace(whole, lengths=lengths, supervised=supervised), accumulate=more)

    return make


def _within(tokens: int) -> Callable[[Case], Case | None]:
    def make(case: Case) -> Case | None:
        assert case.token_budget is not None
        if tokens >= case.token_budget or tokens < max(case.micro.lengths):
            return None
        fewer = _halved(max(1, len(case.micro.lengths) * tokens // case.micro.tokens))(case)
        more = case.accumulate * -(-case.token_budget // tokens)
        return fewer and replace(fewer, accumulate=more, token_budget=tokens)

    return make


def _smaller(case: Case) -> Iterator[Change]:
    """Yield smaller micro-batches, and as many more of them."""
    cost = "the same losses; smaller matrix products"
    if case.token_budget is not None:
        for fewer in (case.token_budget // 2, case.token_budget // 4):
            steps = case.accumulate * -(-case.token_budget // fewer)
            flags = f"--data.micro_batch_tokens {fewer} --trainer.accumulate_grad_batches {steps}"
            yield Change(flags, cost, _within(fewer))
        return
    samples = len(case.micro.lengths)
    for fewer in sorted({samples // 2, samples // 4, 1} - {0, samples}, reverse=True):
        steps = case.accumulate * -(-samples // fewer)
        flags = f"--data.micro_batch_size {fewer} --trainer.accumulate_grad_batches {steps}"
        yield Change(flags, cost, _halved(fewer))


def _in_backward(case: Case) -> Case | None:
    made = _module(optimizer_in_backward=True)(case)
    return made and replace(made, accumulate=1)


def _half_weights(case: Case) -> Case | None:
    return replace(case, precision="bf16-true") if case.precision in ("bf16-mixed", "32-true") else None


def _host_offload(case: Case) -> Case | None:
    return replace(case, strategy=FSDP2_OFFLOAD) if case.strategy != FSDP2_OFFLOAD else None


def _as_lora(case: Case) -> Case | None:
    changes = {"method": "lora", "optimizer": "adamw", "optimizer_in_backward": False, "learning_rate": None}
    return replace(case, tuner=same_settings(case.tuner, **changes), strategy="auto")


def changes(case: Case) -> Iterator[Change]:
    """Yield what could make a run fit, the cheapest first."""
    yield from _smaller(case)
    yield Change("--model.optimizer adamw_8bit", "moments in 8 bits", _only("fft", _module(optimizer="adamw_8bit")))
    in_backward = "--model.optimizer_in_backward true --trainer.gradient_clip_val null"
    if case.accumulate > 1:
        in_backward += " --trainer.accumulate_grad_batches 1"
    yield Change(in_backward, "no clipping, no accumulation", _only("fft", _in_backward))
    for setting in (4, 2, "full"):
        make = _module(gradient_checkpointing=setting)
        yield Change(f"--model.gradient_checkpointing {setting}", "the same losses", make)
    yield Change(
        "--model.offload_activations true", "activations go over the bus twice", _module(offload_activations=True)
    )
    for kind, bits in (("int8", 8), ("nf4", 4)):
        if case.tuner.quantize == "none":
            flags = f"--model.quantize {kind}"
            yield Change(flags, f"frozen weights in {bits} bits", _only("lora", _module(quantize=kind)))
    yield Change("--trainer.precision bf16-true", "updates rounded to bf16", _only("fft", _half_weights))
    yield Change(
        f"--trainer.strategy {FSDP2_OFFLOAD}", "weights go over the bus; AdamW on the CPU", _only("fft", _host_offload)
    )
    yield Change("--model.method lora", "trains adapters, not the weights", _only("fft", _as_lora))


def options(case: Case, room: int) -> list[Option]:
    """Return the single changes that make a case fit, the cheapest first, and the cheapest ones that do together.

    Args:
        room: Bytes that the peak may take.
    """
    known = list(changes(case))
    alone = [Option(c.flags, c.cost, made, predict(made)) for c in known if (made := c.applied(case)) is not None]
    found = [option for option in alone if option.found.peak.total <= room]
    together = _combined(case, known, room)
    return found if together is None or together.flags in {option.flags for option in found} else [*found, together]


def _combined(case: Case, known: list[Change], room: int) -> Option | None:
    """Take one change after the other until it fits, and leave out what is not needed then."""
    taken: list[Change] = []
    now, best = case, predict(case)
    for change in known:
        made = change.applied(now)
        if made is None:
            continue
        found = predict(made)
        if found.peak.total < best.peak.total:
            taken, now, best = [*taken, change], made, found
        if best.peak.total <= room:
            return _together(case, _needed(case, taken, room))
    return None


def _needed(case: Case, taken: list[Change], room: int) -> list[Change]:
    """Leave out, the dearest first, what the others do without."""
    for change in reversed(taken[:-1]):
        rest = [other for other in taken if other is not change]
        if (made := _all(case, rest)) is not None and predict(made).peak.total <= room:
            taken = rest
    return taken


def _all(case: Case, taken: list[Change]) -> Case | None:
    now: Case | None = case
    for change in taken:
        now = change.applied(now) if now is not None else None
    return now


def _together(case: Case, taken: list[Change]) -> Option:
    made = _all(case, taken)
    assert made is not None
    costs = list(dict.fromkeys(change.cost for change in taken))
    return Option(" ".join(change.flags for change in taken), "; ".join(costs), made, predict(made))


def largest_that_fits(case: Case, room: int, *, sizes: Callable[[int], MicroBatch]) -> int:
    """Return the largest n for which the micro-batch `sizes(n)` fits, to a 64th; 0 if none does.

    Memory grows with n on a straight line, nearly: the next n to try is where the line through the two that enclose the
    limit meets it.
    """

    def peak(count: int) -> int:
        return predict(replace(case, micro=sizes(count))).peak.total

    low, high = 1, 2
    least, most = peak(low), peak(high)
    if least > room:
        return 0
    while most <= room:
        low, least = high, most
        high = max(2 * high, low + int((room - most) * 1.02 / (most / high)))
        most = peak(high)
    while high - low > max(1, low // 64):
        guess = low + int((high - low) * (room - least) / (most - least))
        guess = min(max(guess, low + 1), high - 1)
        if (found := peak(guess)) <= room:
            low, least = guess, found
            after = min(high - 1, low + max(1, low // 64))  # most often it is the one
            if after > low and (found := peak(after)) > room:
                return low
            if after > low:
                low, least = after, found
        else:
            high, most = guess, found
    return low


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
    needed = found.peak.total / GIB + CONTEXT_GIB
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
        _print_options(console, case, found, options(case, room))
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


def _print_options(console: Console, case: Case, found: Prediction, made: list[Option]) -> None:
    if not made:
        console.print("No change that is known here makes it fit: take a smaller model or more GPUs.")
        return
    console.print("\nWhat makes it fit, the cheapest first:")
    compute = flops_per_token(case, found)
    table = Table("GiB", "compute", "cost", "add to the command", box=None, pad_edge=False, header_style="bold")
    table.columns[3].overflow = "fold"
    for option in made[:MOST_CHANGES]:
        peak = option.found.peak.total / GIB + CONTEXT_GIB
        times = flops_per_token(option.case, option.found) / compute
        table.add_row(f"{peak:.2f}", f"x {times:.2f}", option.cost, Text(option.flags))
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
