"""FSDP2: weights, gradients and optimizer state in shards, one on each device; or in host memory, also on one device.

Every decoder layer is gathered when it computes and given up after; embeddings, last norm and head belong to the root,
which stays whole from the forward to the backward pass. What a device holds for good shrinks with the number of
devices; the price is that every weight travels twice and every gradient once in each micro-batch. That includes the
micro-batches of an accumulation: gradients kept whole until its end would be as large as the weights again.

Checkpoints are whole, in the same form as every other strategy's, so that a run may go on with another one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import ModelParallelStrategy, StrategyRegistry
from lightning.pytorch.trainer.states import TrainerFn
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer
from typing_extensions import override

from lit_tune import checkpoint
from lit_tune.errors import InputError
from lit_tune.modules.llama import LlamaTuner, compute_dtype

FSDP2 = "fsdp2"
OFFLOADED = "fsdp2_cpu_offload"
NAMES = (FSDP2, OFFLOADED)


def choose(strategy: Any, *, method: str, devices: int, command: str, precision: str, optimizer: str) -> Any:
    """Return the strategy of a run: the one that was named; for `auto`, FSDP2 where all parameters train on several.

    Args:
        strategy: The setting `trainer.strategy`.
        devices: Processes that the run has in total.

    Raises:
        InputError: Weights are to be sharded that cannot be, with the reason and what to set instead.
    """
    fault = unfit(command=command, precision=precision, optimizer=optimizer)
    if strategy in NAMES and fault:
        raise InputError(f"trainer.strategy is {strategy}: {fault}.")
    # Lightning's own `auto` is no strategy on one device and DDP on several, which is right for LoRA's few gradients.
    return FSDP2 if strategy == "auto" and method == "fft" and devices > 1 and not fault else strategy


def unfit(*, command: str, precision: str, optimizer: str) -> str | None:
    """Return why a run cannot have its weights sharded, and what to set instead; None if it can."""
    if command == "predict":
        return "ranks answer prompts of their own, but shards need all ranks at every token; use auto with predict"
    if precision.startswith("16"):
        return (
            f"with trainer.precision {precision}, the loss scaler of fp16 would see the overflows of one shard only; "
            "use bf16-mixed, bf16-true or 32-true"
        )
    if optimizer not in ("adamw", "sgd"):
        return f"{optimizer} looks at whole weights, a device has shards of them; use model.optimizer adamw or sgd"
    return None


def shard(root: torch.nn.Module, mesh: DeviceMesh, *, dtype: torch.dtype, offload: bool) -> None:
    """Shard a transformers causal LM in place: every decoder layer a unit, all else the root.

    Args:
        mesh: The devices, in one dimension.
        dtype: Of the forward pass. Weights are gathered in it; gradients are summed in fp32.
        offload: Keep weights, gradients and optimizer state in host memory.
    """
    half = dtype in (torch.bfloat16, torch.float16)
    precision = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32) if half else MixedPrecisionPolicy()
    policy = CPUOffloadPolicy(pin_memory=mesh.device_type == "cuda") if offload else OffloadPolicy()
    model: Any = root
    for layer in getattr(model, model.base_model_prefix).layers:
        fully_shard(layer, mesh=mesh, mp_policy=precision, offload_policy=policy)
    fully_shard(root, mesh=mesh, mp_policy=precision, offload_policy=policy)


def as_forward_of(root: torch.nn.Module, method: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return `method` such that FSDP2 takes it for the forward pass of `root`: gathers before it, reduces after."""
    name = method.__name__
    setattr(root, name, method)
    register_fsdp_forward_method(root, name)
    forward: Callable[..., Tensor] = getattr(root, name)
    return forward


@torch.no_grad()
def hand_out(weights: Mapping[str, Tensor], root: torch.nn.Module, device: torch.device) -> None:
    """Fill the sharded `root` of every rank with the `weights` of rank 0; all ranks call this.

    Args:
        weights: Parameters and buffers by name, whole; only rank 0's count.
        device: Where the ranks exchange them: no more than one at a time lies there whole.
    """
    for name, target in [*root.named_parameters(), *root.named_buffers()]:
        own = weights.get(name)
        whole = torch.empty(target.shape, dtype=target.dtype, device=device) if own is None else own.to(device)
        if isinstance(target, DTensor):
            target.to_local().copy_(distribute_tensor(whole, target.device_mesh, target.placements).to_local())
        else:
            torch.distributed.broadcast(whole, src=0)
            target.copy_(whole)


def gather(state: Any, *, keep: bool) -> Any:
    """Return nested containers with whole tensors in host memory for the sharded ones in them; all ranks call this.

    Args:
        keep: Rank 0 keeps them, the others let each go before the next one comes.
    """
    whole: dict[int, Tensor] = {}  # tied weights are one, in the checkpoint too

    def full(tensor: Tensor) -> Tensor:
        assert isinstance(tensor, DTensor)
        # Offloaded shards lie in host memory, but the ranks exchange them by their devices.
        place = tensor.to_local().untyped_storage()._cdata  # not its address, of which an empty shard has none
        if place not in whole:
            on_device: Any = tensor.detach().to(tensor.device_mesh.device_type)
            gathered: Tensor = on_device.full_tensor()
            whole[place] = gathered.cpu() if keep else gathered.new_empty(0)
        return whole[place]

    return apply_to_collection(state, DTensor, full)


@torch.no_grad()
def shard_like(whole: Tensor, parameter: DTensor) -> DTensor:
    """Return this rank's part of a tensor that every rank has, where and as the parameter's own part lies."""
    device = parameter.device_mesh.device_type
    parts = distribute_tensor(whole.to(device), parameter.device_mesh, parameter.placements, src_data_rank=None)
    own = torch.empty_like(parameter, dtype=whole.dtype, requires_grad=False)
    assert isinstance(own, DTensor)
    own.to_local().copy_(parts.to_local())
    return own


def shard_optimizer_state(state: Mapping[str, Any], optimizer: Optimizer) -> dict[str, Any]:
    """Return an optimizer's whole state with this rank's part of what has a parameter's shape."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]

    def part(value: Any, parameter: Tensor) -> Any:
        if not isinstance(value, Tensor):
            return value
        if isinstance(parameter, DTensor) and value.shape == parameter.shape:
            return shard_like(value, parameter)
        return value.clone()  # it may be part of a mapped file, whose room on the disk it would hold

    parts = {
        number: {name: part(value, parameters[number]) for name, value in values.items()}
        for number, values in state["state"].items()
    }
    return {"state": parts, "param_groups": state["param_groups"]}


class ShardedStrategy(ModelParallelStrategy):
    """FSDP2 over all devices, as Lightning's `ModelParallelStrategy` makes their mesh.

    Args:
        offload: Keep weights, gradients and optimizer state in host memory; the optimizer computes there, too.
    """

    lightning_module: LlamaTuner | None

    # Other ranks may come with weights on the meta device: they get rank 0's.
    loads_on_rank_zero = True

    def __init__(self, offload: bool = False) -> None:
        # NOTE: Lightning's `auto` would mean tensor parallel over all devices of a machine.
        super().__init__(tensor_parallel_size=1, save_distributed_checkpoint=False)
        self.offload = offload

    # -- setting up --------------------------------------------------------------------------------------------------

    @override
    def setup_environment(self) -> None:
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    @override
    def setup(self, trainer: Trainer) -> None:
        assert self.accelerator is not None
        assert self.lightning_module is not None
        self.accelerator.setup(trainer)
        if not isinstance(self.lightning_module.causal_lm, FSDPModule):
            self._shard(self.lightning_module)
        self.barrier()
        if trainer.state.fn == TrainerFn.FITTING:
            self.setup_optimizers(trainer)
        self.setup_precision_plugin()

    def _shard(self, module: LlamaTuner) -> None:
        root = module.causal_lm
        is_empty = next(root.parameters()).is_meta
        alone = self.world_size == 1
        weights = {} if is_empty or alone else {name: tensor.detach() for name, tensor in _tensors(root)}
        dtype = compute_dtype(str(self.precision_plugin.precision))
        shard(root, self.device_mesh["data_parallel"], dtype=dtype, offload=self.offload)
        if is_empty:
            root.to_empty(device="cpu" if self.offload else self.root_device)
            root.tie_weights()
        self._move_rest(module, root)
        if not alone:
            hand_out(weights, root, self.root_device)
        module.nll = as_forward_of(root, module.nll)  # type: ignore[method-assign]

    def _move_rest(self, module: LlamaTuner, root: torch.nn.Module) -> None:
        """Move to the device what is no parameter: buffers and metrics."""
        for buffer in root.buffers():
            buffer.data = buffer.to(self.root_device)
        for child in module.children():
            if child is not module.model:
                child.to(self.root_device)
        module._device = self.root_device  # Lightning's; set by `to`, which would move the parameters, too

    # -- checkpoints -------------------------------------------------------------------------------------------------

    @property
    @override
    def restore_checkpoint_after_setup(self) -> bool:
        return False  # rank 0 loads the weights before they are handed out, and a run is refused before it has begun

    @property
    @override
    def lightning_restore_optimizer(self) -> bool:
        return True

    @override
    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        # Mapped: the ranks of a machine share one copy, and take of it what they need.
        return checkpoint.read(Path(self.broadcast(checkpoint_path)), mapped=True)

    @override
    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        assert self.lightning_module is not None
        assert not isinstance(self.lightning_module.causal_lm, FSDPModule), "weights are loaded before sharding"
        if not next(self.lightning_module.causal_lm.parameters()).is_meta:
            self.lightning_module.load_state_dict(checkpoint["state_dict"], strict=strict)

    @override
    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            optimizer.load_state_dict(shard_optimizer_state(state, optimizer))

    @override
    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Return the whole state dict on rank 0, nothing on the others; all ranks call this."""
        assert self.lightning_module is not None
        state: dict[str, Any] = gather(self.lightning_module.state_dict(), keep=self.is_global_zero)
        return state if self.is_global_zero else {}

    @override
    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """Return the optimizer's whole state on rank 0, nothing on the others; all ranks call this."""
        state: dict[str, Any] = gather(optimizer.state_dict(), keep=self.is_global_zero)
        return state if self.is_global_zero else {}

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any | None = None) -> None:
        # NOTE: Lightning's own refuses storage options, for it would write its shards without our writer.
        if self.is_global_zero:
            self.checkpoint_io.save_checkpoint(checkpoint, filepath, storage_options=storage_options)

    @override
    def teardown(self) -> None:
        super().teardown()
        self.checkpoint_io.teardown()


def _tensors(module: torch.nn.Module) -> list[tuple[str, Tensor]]:
    return [*module.named_parameters(), *module.named_buffers()]


for _name, _offload in ((FSDP2, False), (OFFLOADED, True)):
    StrategyRegistry.register(_name, ShardedStrategy, description=f"FSDP2, offload={_offload}", offload=_offload)
