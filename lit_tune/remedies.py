"""What makes a run fit: changes of its settings, each with what it would hold and cost."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from lit_tune import advice, techniques
from lit_tune.flops import Matrices, training_flops
from lit_tune.memory import GIB
from lit_tune.predict import Case, Prediction, predict, same_settings
from lit_tune.strategies import OFFLOADED
from lit_tune.workload import MicroBatch

# What a process takes of a GPU before its first tensor: the CUDA context and the kernels' code.
CONTEXT_GIB = 0.5


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
    """Changes that were predicted together.

    Args:
        flags: What to add to the command.
        cost: What it costs besides compute.
        found: What is predicted.
        compute: How many times the operations of the case that was changed.
    """

    flags: str
    cost: str
    case: Case
    found: Prediction
    compute: float


def needed_gib(found: Prediction) -> float:
    """Return what a GPU must have, CUDA's own share included."""
    return found.peak.total / GIB + CONTEXT_GIB


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
    return replace(case, strategy=OFFLOADED) if case.strategy != OFFLOADED else None


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
        f"--trainer.strategy {OFFLOADED}", "weights go over the bus; AdamW on the CPU", _only("fft", _host_offload)
    )
    yield Change("--model.method lora", "trains adapters, not the weights", _only("fft", _as_lora))


def options(case: Case, found: Prediction, room: int) -> list[Option]:
    """Return the single changes that make a case fit, the cheapest first, and the cheapest ones that do together.

    Args:
        found: What is predicted for the case as it is.
        room: Bytes that the peak may take.
    """
    flops, known = flops_per_token(case, found), list(changes(case))

    def option(taken: list[Change]) -> Option | None:
        made: Case | None = case
        for change in taken:
            made = change.applied(made) if made is not None else None
        if made is None:
            return None
        flags, costs = (list(dict.fromkeys(words)) for words in zip(*((c.flags, c.cost) for c in taken), strict=True))
        then = predict(made)
        return Option(" ".join(flags), "; ".join(costs), made, then, flops_per_token(made, then) / flops)

    alone = [made for change in known if (made := option([change])) is not None]
    fitting = [made for made in alone if made.found.peak.total <= room]
    together = _combined(known, option, found.peak.total, room)
    return fitting if together is None or together.flags in {made.flags for made in fitting} else [*fitting, together]


def _combined(
    known: list[Change], option: Callable[[list[Change]], Option | None], peak: int, room: int
) -> Option | None:
    """Take one change after the other until it fits, and leave out, the dearest first, what is not needed then."""
    taken: list[Change] = []
    best: Option | None = None
    for change in known:
        made = option([*taken, change])
        if made is not None and made.found.peak.total < peak:
            taken, best, peak = [*taken, change], made, made.found.peak.total
            if peak <= room:
                break
    else:
        return None
    for change in reversed(taken[:-1]):
        rest = [other for other in taken if other is not change]
        if (made := option(rest)) is not None and made.found.peak.total <= room:
            taken, best = rest, made
    return best


# What a run may change when it goes on: the samples of a step stay, and what trains.
_GOES_ON = ("--data.micro_batch_size", "--trainer.accumulate", "--model.gradient_ch", "--model.offload_activations")


def advised(case: Case, found: Prediction, room: int) -> list[advice.Change]:
    """Return what makes a run fit that ran out of memory, with its figures, the cheapest first."""
    return [
        advice.Change(
            option.flags,
            f"{needed_gib(option.found):.2f} GiB predicted, compute x {option.compute:.2f}; {option.cost}",
            fresh=not all(flag.startswith(_GOES_ON) for flag in option.flags.split() if flag.startswith("--")),
        )
        for option in options(case, found, room)
    ]


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
