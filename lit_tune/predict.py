"""Predict the memory of an optimizer step by taking one with tensors that have shapes, but no data.

No formula says what a layer of transformers or PEFT keeps: the module's own code runs, forward and backward, on fake
tensors (torch's FakeTensorMode), and a ledger writes down when each storage is made, what becomes of it and when it is
freed. That takes neither weights nor a GPU. What is left to rules is what that code does not show: what an
allocator rounds up, what kernels of a GPU use besides, how a strategy shards.

All layers of a decoder are alike, so two models of few layers are traced, and every moment's figures are continued to
the real depth on a straight line: each layer adds its weights, gradients, optimizer state and activations once.
"""

from __future__ import annotations

import copy
import inspect
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from typing_extensions import override

from lit_tune.memory import (
    CATEGORIES,
    Footprint,
    SavedTensors,
    optimizer_state,
    optimizer_tables,
    optimizer_workspace,
    storage_parts,
    weight_tensors,
)
from lit_tune.modules import attention, load
from lit_tune.modules.checkpointing import GradientCheckpointing
from lit_tune.modules.llama import LlamaTuner, compute_dtype, storage_dtype
from lit_tune.modules.lora import Lora, settings_of
from lit_tune.modules.offload import COPIES_UNDER_WAY, FETCHED_AHEAD, SMALLEST_BYTES
from lit_tune.strategies import FSDP2, OFFLOADED
from lit_tune.workload import MicroBatch

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

Device = Literal["cuda", "cpu"]
Moments = dict[str, Footprint]

MIB = 1024**2
CUDA_ROUNDING = 512  # bytes: torch's caching allocator hands out multiples of it (kMinBlockSize)
# What cuBLAS allocates through torch for its own use at the first matrix product (getChosenWorkspaceSize: 32 MiB on
# Hopper and later, 8.125 MiB before). The larger one: a prediction that is too low is the worse one.
CUBLAS_WORKSPACE = 32 * MIB

FORWARD, LOSS, BACKWARD_LAST, BACKWARD_MIDDLE, BACKWARD_FIRST, OPTIMIZER = (
    "forward pass",
    "loss",
    "backward pass, last layers",
    "backward pass, layers between",
    "backward pass, first layers",
    "optimizer step",
)


@dataclass(frozen=True)
class Case:
    """All that the memory of a run depends on.

    Args:
        tuner: The module's settings; it needs no model.
        config: The architecture.
        micro: The largest micro-batch.
        precision: As `trainer.precision` has it.
        device: The kind of device that the run is for.
        accumulate: Micro-batches of an optimizer step on a device.
        devices: How many of them.
        strategy: As `trainer.strategy` has it.
        token_budget: `data.micro_batch_tokens`, where that bounds a micro-batch.
    """

    tuner: LlamaTuner
    config: PreTrainedConfig
    micro: MicroBatch
    precision: str
    device: Device = "cuda"
    accumulate: int = 1
    devices: int = 1
    strategy: str = "auto"
    token_budget: int | None = None


@dataclass(frozen=True)
class Prediction:
    """What a run will hold, in bytes.

    Args:
        moments: The most that lives on a device at each moment of an optimizer step.
        moment: The one with the peak.
        weights, gradients, optimizer, activations: The most of each, whenever that is.
        trained: What trains.
        host: Held in host memory instead: offloaded activations, paged or offloaded optimizer state and weights.
        checkpoint: Size of one, to a few KiB.
    """

    moments: Moments
    moment: str
    weights: int
    gradients: int
    optimizer: int
    activations: int
    trained: int
    host: int
    checkpoint: int

    @property
    def peak(self) -> Footprint:
        """What a device holds at the peak."""
        return self.moments[self.moment]


@dataclass(frozen=True)
class Trace:
    """What was written down of one optimizer step.

    Args:
        moments: The most that lived at each moment of the step.
        activations: The most that autograd kept at a time.
        offloaded: Of these, what was in host memory.
        trained: Bytes of the weights that train: as much as their gradients.
    """

    moments: Moments
    activations: int
    offloaded: int = 0
    trained: int = 0


# -- the ledger --------------------------------------------------------------------------------------------------------


class Entry:
    """A storage in the ledger."""

    def __init__(self, size: int) -> None:
        self.category = "other"
        self.size = size


class Ledger(TorchDispatchMode):
    """Writes down every storage that is made within, what it is, and the most that lived at each moment of a step.

    Args:
        granularity: Sizes are rounded up to a multiple of it.
    """

    def __init__(self, *, granularity: int = 1) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.moments: Moments = {}
        self.most_activations = 0
        self.offloaded: list[int] = []  # sizes of the storages that have gone to host memory
        self._moment = ""
        self._granularity = granularity
        self._live = dict.fromkeys(CATEGORIES, 0)
        self._entries: weakref.WeakKeyDictionary[Any, Entry] = weakref.WeakKeyDictionary()

    @override
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for value in tree_leaves(made):
            if isinstance(value, Tensor):
                self.enter(value, "other")
        return made

    def at(self, moment: str) -> None:
        """Begin a moment of the step."""
        self._moment = moment
        self._compare()

    def enter(self, tensor: Tensor, category: str) -> Tensor:
        """Write down what a tensor's storages are, and return it; what has another name than `other` keeps it."""
        for part in storage_parts(tensor):
            storage = part.untyped_storage()
            entry = self._entries.get(storage)
            if entry is None:
                entry = self._entries[storage] = Entry(-(-storage.nbytes() // self._granularity) * self._granularity)
                self._live["other"] += entry.size
                weakref.finalize(storage, self._free, entry)
            if entry.category == "other" != category:
                self._live["other"] -= entry.size
                self._live[category] += entry.size
                entry.category = category
        self._compare()
        return tensor

    def offload(self, tensor: Tensor) -> None:
        """Write down that a tensor's storage goes to host memory and comes back when it is needed."""
        entry = self._entries[tensor.untyped_storage()]
        if entry.category == "other":
            self.offloaded.append(entry.size)
            self._live["other"] -= entry.size
            entry.category, entry.size = "activations", 0

    def _free(self, entry: Entry) -> None:
        self._live[entry.category] -= entry.size

    def _compare(self) -> None:
        self.most_activations = max(self.most_activations, self._live["activations"])
        if sum(self._live.values()) > self.moments.get(self._moment, Footprint()).total:
            self.moments[self._moment] = Footprint(**self._live)


# -- a model of shapes -------------------------------------------------------------------------------------------------


def with_layers(config: PreTrainedConfig, layers: int) -> PreTrainedConfig:
    """Return a copy of an architecture with another depth."""
    changed = copy.deepcopy(config)
    changed.num_hidden_layers = layers
    if getattr(changed, "layer_types", None):
        changed.layer_types = changed.layer_types[:layers]
    return changed


def fakes_of(module: torch.nn.Module, mode: FakeTensorMode) -> None:
    """Replace all tensors of a module on the meta device by fake ones of the CPU."""
    memo: dict[int, torch.nn.Parameter] = {}  # tied weights stay tied

    def fake(tensor: Tensor) -> Tensor:
        made: Tensor = mode.fake_tensor_converter.from_meta_and_device(mode, tensor, torch.device("cpu"))
        return made

    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                if id(parameter) not in memo:
                    data = fake(parameter.data) if type(parameter) is torch.nn.Parameter else None
                    memo[id(parameter)] = (
                        quantised(parameter, part, mode)
                        if data is None
                        else torch.nn.Parameter(data, requires_grad=parameter.requires_grad)
                    )
                part._parameters[name] = memo[id(parameter)]
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = fake(buffer.to("meta"))


def quantised(parameter: Any, layer: Any, mode: FakeTensorMode) -> torch.nn.Parameter:
    """Return the fake weight of a bitsandbytes layer, with its constants, as quantising leaves it.

    int8 (LLM.int8): a byte a weight and an fp32 scale a row. 4 bits: half a byte a weight; an 8-bit scale a block of 64
    weights and an fp32 scale of those a block of 256 ("double quantisation"); a code book of 16 fp32 values and one of
    256 for the scales, and one offset, each layer its own.
    """
    from bitsandbytes.functional import QuantState  # noqa: PLC0415
    from bitsandbytes.nn import Params4bit  # noqa: PLC0415

    shape, count = parameter.shape, parameter.numel()
    with mode:
        if not isinstance(parameter, Params4bit):
            layer.state.threshold = 0.0  # how many columns are outliers, nobody knows beforehand
            weight: Any = torch.nn.Parameter(torch.empty(shape, dtype=torch.int8), requires_grad=False)
            weight.CB, weight.SCB = weight.data, torch.empty(shape[0])
            return weight  # type: ignore[no-any-return]
        blocks = -(-count // parameter.blocksize)
        weight = torch.nn.Parameter(torch.empty((count + 1) // 2, 1, dtype=torch.uint8), requires_grad=False)
        scales = QuantState(torch.empty(-(-blocks // 256)), code=torch.empty(256), blocksize=256, dtype=torch.float32)
        weight.quant_state = QuantState(
            absmax=torch.empty(blocks, dtype=torch.uint8),
            shape=shape,
            code=torch.empty(16),
            blocksize=parameter.blocksize,
            quant_type=parameter.quant_type,
            dtype=layer.compute_dtype,
            offset=torch.empty(()),
            state2=scales,
        )
        return weight  # type: ignore[no-any-return]


def fake_batch(micro: MicroBatch) -> dict[str, Any]:
    """Return a batch as `lit_tune.data.collate` makes it; call it within a FakeTensorMode."""
    rows, length = (1, micro.tokens) if micro.packed else (len(micro.lengths), max(micro.lengths))
    batch: dict[str, Any] = {
        name: torch.empty(rows, length, dtype=torch.int64) for name in ("input_ids", "labels", "position_ids")
    }
    batch |= {name: torch.empty(micro.supervised, dtype=torch.int64) for name in ("positions", "targets")}
    if micro.packed:
        bounds = list(accumulate(micro.lengths, initial=0))
        cu: Any = torch.empty(len(bounds), dtype=torch.int32)
        cu.tolist = lambda: bounds  # known, although the tensor holds no data
        batch |= {"cu_seqlens": cu, "longest": max(micro.lengths)}
    return batch


# -- an optimizer step -------------------------------------------------------------------------------------------------


class Kept(SavedTensors):
    """What autograd saves, named in a ledger; of the larger ones that they are offloaded, where they are.

    NOTE: `ActivationOffload` lets fake tensors stay where they are, and hands them to `note` as they are.
    """

    def __init__(self, ledger: Ledger, *, offload: bool) -> None:
        super().__init__()
        self.ledger = ledger
        self.offload = offload

    @override
    def note(self, tensor: Tensor) -> Tensor:
        if self.offload and tensor.untyped_storage().nbytes() >= SMALLEST_BYTES:
            self.ledger.offload(tensor)
        else:
            self.ledger.enter(tensor, "activations")
        return tensor


def same_settings(tuner: LlamaTuner, **changes: Any) -> LlamaTuner:
    """Return a fresh module with the settings of another one, some of them changed."""
    names = [name for name in inspect.signature(type(tuner)).parameters if name not in changes]
    return type(tuner)(**{name: getattr(tuner, name) for name in names}, **changes)


def trace(case: Case) -> Trace:
    """Take an optimizer step of fake tensors, on one device, and return what was written down."""
    precision, device = case.precision, case.device
    tuner = same_settings(case.tuner, adapter=None, lora=_adapters(case.tuner))
    trainer = SimpleNamespace(precision=precision)
    tuner.trainer = trainer  # type: ignore[assignment]
    mode = FakeTensorMode()
    tuner.adopt(
        load.empty_llama(
            case.config,
            dtype=storage_dtype(precision, trains=tuner.method == "fft"),
            quantize=tuner.quantize,
            attention_name=tuner.attention,
        )
    )
    fakes_of(tuner, mode)
    ledger = Ledger(granularity=CUDA_ROUNDING if device == "cuda" else 1)
    trained = [parameter for parameter in tuner.parameters() if parameter.requires_grad]

    def note_gradient(parameter: Tensor) -> None:
        if tuner.optimizer_in_backward:
            parameter.grad = None
        else:
            ledger.enter(_grad(parameter), "gradients")

    with mode, attention.as_on(device):
        for tensor in weight_tensors(tuner):
            ledger.enter(tensor, "weights")
        state = [torch.empty(part, dtype=kind) for p in trained for part, kind in optimizer_state(tuner.optimizer, p)]
        state.append(torch.empty(optimizer_tables(tuner.optimizer, trained), dtype=torch.uint8))
        for tensor in state:
            ledger.enter(tensor, "optimizer")
        for parameter in trained:
            if case.accumulate > 1:
                parameter.grad = ledger.enter(torch.empty_like(parameter), "gradients")
            parameter.register_post_accumulate_grad_hook(note_gradient)
        tuner.saved_tensors = Kept(ledger, offload=tuner.offload_activations)
        _label(tuner, ledger)
        batch = fake_batch(case.micro)
        dtype = compute_dtype(precision)
        with ledger:
            ledger.at(FORWARD)
            # As Lightning's plugin has it under `*-mixed`: weights cast once are kept until the forward pass is over.
            with torch.autocast("cpu", dtype=dtype, enabled=precision.endswith("mixed")):
                nll = tuner.nll(batch)
            ledger.at(LOSS)
            (nll * 1.0).backward()
            ledger.at(OPTIMIZER)
            fused = not precision.startswith("16")
            workspace = optimizer_workspace(tuner.optimizer, trained, fused=fused, on_gpu=device == "cuda")
            torch.empty(workspace, dtype=torch.uint8)
    passing = (COPIES_UNDER_WAY + FETCHED_AHEAD) * max(ledger.offloaded, default=0)
    moments = {name: found + Footprint(other=passing) for name, found in ledger.moments.items() if name}
    trained_bytes = sum(p.numel() * p.element_size() for p in trained)
    return Trace(moments, ledger.most_activations, sum(ledger.offloaded), trained_bytes)


def _adapters(tuner: LlamaTuner) -> Lora:
    """Return settings that give adapters of the same shapes, without looking at weights."""
    lora = settings_of(tuner.adapter) if tuner.adapter and tuner.method == "lora" else tuner.lora
    return replace(lora, variant="lora") if lora.variant == "pissa" else lora  # the base it changes stays as large


def _grad(parameter: Tensor) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad


def _label(tuner: LlamaTuner, ledger: Ledger) -> None:
    """Have the ledger know when the backward pass comes to which layers."""
    layers = tuner.decoder.layers
    group = period(tuner)

    def label(number: int) -> str:
        if number >= len(layers) - group:
            return BACKWARD_LAST
        return BACKWARD_FIRST if number < group else BACKWARD_MIDDLE

    def watch(number: int) -> Any:
        def forward_hook(_module: Any, _inputs: Any, output: Any) -> None:
            hidden = output[0] if isinstance(output, tuple) else output
            if hidden.requires_grad:
                hidden.register_hook(lambda _: ledger.at(label(number)))

        return forward_hook

    for number, layer in enumerate(layers):
        layer.register_forward_hook(watch(number))


def period(tuner: LlamaTuner) -> int:
    """Return after how many layers the same begins again."""
    return tuner.gradient_checkpointing if isinstance(tuner.gradient_checkpointing, int) else 1


def trace_depth(case: Case) -> Trace:
    """Return the trace of a step at the model's real depth, continued from two of few layers."""
    layers, group = case.config.num_hidden_layers, period(case.tuner)

    def traced(depth: int) -> Trace:
        return trace(replace(case, config=with_layers(case.config, depth)))

    few = 2 * group + layers % group
    if layers <= few + group:
        return traced(layers)
    return continued(traced(few), traced(few + group), times=(layers - few) // group)


def continued(few: Trace, more: Trace, *, times: int) -> Trace:
    """Return a trace as much larger than `few` as `times` the step from `few` to `more`.

    What lives at a layer's turn in the backward pass falls or rises with the layer's number on a straight line, so the
    most of it is at the first or at the last layers: those between need no figures of their own.
    """

    def line(a: int, b: int) -> int:
        return a + times * (b - a)

    moments = {
        name: Footprint(*(line(getattr(least, part), getattr(more.moments[name], part)) for part in CATEGORIES))
        for name, least in few.moments.items()
        if name in more.moments and name != BACKWARD_MIDDLE
    }
    return Trace(
        moments,
        line(few.activations, more.activations),
        line(few.offloaded, more.offloaded),
        line(few.trained, more.trained),
    )


# -- a run -------------------------------------------------------------------------------------------------------------


def predict(case: Case) -> Prediction:
    """Predict what a run holds on each device and in host memory.

    Raises:
        InputError: Settings that no model can be made with.
    """
    if case.strategy in (FSDP2, OFFLOADED):
        return _sharded(case)
    traced = trace_depth(case)
    paged = case.tuner.optimizer == "paged_adamw_8bit"
    gradients = 0 if case.tuner.optimizer_in_backward else traced.trained
    # DDP sums gradients in buckets, copies of them (torch's Reducer; gradient_as_bucket_view is off).
    buckets = traced.trained if case.devices > 1 else 0
    workspace = CUBLAS_WORKSPACE if case.device == "cuda" else 0
    moments = {name: found + Footprint(other=buckets + workspace) for name, found in traced.moments.items()}
    most = max(moments.values(), key=lambda found: found.optimizer)
    if paged:  # in memory that both see, and that lies where it was used last: at the peak, on the host
        moments = {name: replace(found, optimizer=0) for name, found in moments.items()}
    return _prediction(
        moments,
        weights=most.weights,
        gradients=gradients,
        optimizer=most.optimizer,
        activations=traced.activations,
        host=traced.offloaded + (most.optimizer if paged else 0),
        trained=traced.trained,
        checkpoint=traced.trained + most.optimizer,
    )


def heaviest(case: Case, micros: Sequence[MicroBatch]) -> tuple[Case, Prediction]:
    """Return the case of the micro-batch with the highest peak, and what is predicted for it."""
    cases = [replace(case, micro=micro) for micro in micros]
    return max(((each, predict(each)) for each in cases), key=lambda pair: pair[1].peak.total)


def _prediction(moments: Moments, *, checkpoint: int, **most: int) -> Prediction:
    moment = max(moments, key=lambda name: moments[name].total)
    return Prediction(moments, moment, **most, checkpoint=checkpoint)


def _sharded(case: Case) -> Prediction:
    """Predict for FSDP2, see `lit_tune.strategies`.

    A device holds its share of the weights, of the gradients (fp32) and of the optimizer state, or none of them where
    they are offloaded. Besides, gathered in the dtype of the forward pass: the root (embeddings, last norm, head) from
    the forward to the backward pass, the layer that computes and the one gathered ahead; in the backward pass the
    gradients of both, and those of the layer before in fp32, on their way to the others.
    """
    half = compute_dtype(case.precision) in (torch.bfloat16, torch.float16)
    # Gathered in half precision, weights are not cast again by autocast: as they are under `*-true`.
    traced_case = replace(case, precision=case.precision.replace("mixed", "true"), accumulate=1, strategy="auto")
    group = period(case.tuner)
    few = trace(replace(traced_case, config=with_layers(case.config, group)))
    more = trace(replace(traced_case, config=with_layers(case.config, 2 * group)))
    one = (_weights(more) - _weights(few)) // group
    root = _weights(few) - group * one
    traced = trace_depth(traced_case)
    wide = 2 if half and storage_dtype(case.precision, trains=case.tuner.method == "fft") == torch.float32 else 1
    offloaded = case.strategy == OFFLOADED

    def share(size: int) -> int:
        return -(-size // case.devices)

    weights, optimizer = share(wide * _weights(traced)), share(wide * _optimizer(traced))
    gradients = share((2 if half else 1) * traced.trained)
    held = Footprint() if offloaded else Footprint(weights=weights, optimizer=optimizer)

    def at(name: str, found: Footprint) -> Footprint:
        gathered = 0 if name == OPTIMIZER else root + 2 * one
        backward = name not in (FORWARD, OPTIMIZER)
        if backward:
            gathered += root + one + (2 if half else 1) * one
        kept = 0 if offloaded else share((2 if half else 1) * found.gradients)
        other = found.other + gathered + (CUBLAS_WORKSPACE if case.device == "cuda" else 0)
        return held + Footprint(gradients=kept, activations=found.activations, other=other)

    return _prediction(
        {name: at(name, found) for name, found in traced.moments.items()},
        weights=held.weights,
        gradients=0 if offloaded else gradients,
        optimizer=held.optimizer,
        activations=traced.activations,
        host=traced.offloaded + (weights + gradients + optimizer if offloaded else 0),
        trained=wide * traced.trained,
        checkpoint=wide * (traced.trained + _optimizer(traced)),
    )


def _weights(traced: Trace) -> int:
    return max(found.weights for found in traced.moments.values())


def _optimizer(traced: Trace) -> int:
    return max(found.optimizer for found in traced.moments.values())


# By what they cost: how much of the forward pass is computed again. `mlp` costs as much as 2, and leaves more.
_CHECKPOINTING: tuple[GradientCheckpointing, ...] = ("none", 4, 2, "full")


def cheapest_checkpointing(case: Case, room: int) -> GradientCheckpointing:
    """Return the cheapest gradient checkpointing with which a device holds no more than `room` bytes; else `full`."""
    for setting in _CHECKPOINTING[:-1]:
        if predict(replace(case, tuner=same_settings(case.tuner, gradient_checkpointing=setting))).peak.total <= room:
            return setting
    return _CHECKPOINTING[-1]
