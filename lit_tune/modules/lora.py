"""LoRA: small trainable matrices beside frozen weights, put there by PEFT.

A frozen weight `W` of shape (out, in) gets `B @ A` added, with `A` (rank, in) and `B` (out, rank). Only A and B need
gradients and optimizer state, so both cost `rank * (in + out)` instead of `in * out` parameters a layer. Paper: Hu et
al., "LoRA: Low-Rank Adaptation of Large Language Models", arXiv:2106.09685.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from lit_tune.errors import InputError

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

ALL_LINEAR = "all-linear"


@dataclass
class Lora:
    """Settings of the adapters; used where `--model.method` is `lora`.

    Args:
        rank: Inner dimension of the adapters (`r` in PEFT).
        alpha: The adapter's output is scaled by alpha / rank (rsLoRA: alpha / sqrt(rank)).
        dropout: Probability that an element of an adapter's input is dropped in training.
        targets: Names of the linear layers that get an adapter, such as q_proj, k_proj, v_proj, o_proj, gate_proj,
            up_proj, down_proj; or `all-linear` for all of them but the output head.
        bias: Which biases train too: none, all, or those of the layers with an adapter.
        variant: `lora`; `rslora` (arXiv:2312.03732) scales for high ranks; `dora` (arXiv:2402.09353) learns magnitude
            and direction apart; `pissa` (arXiv:2404.02948) starts from the weight's principal singular vectors.
    """

    rank: int = 16
    alpha: float = 32
    dropout: float = 0.05
    targets: list[str] | str = field(default_factory=lambda: ["q_proj", "v_proj"])
    bias: Literal["none", "all", "lora_only"] = "none"
    variant: Literal["lora", "rslora", "dora", "pissa"] = "lora"

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise InputError(f"model.lora.rank is {self.rank}; it must be 1 or more.")
        if not 0 <= self.dropout < 1:
            raise InputError(f"model.lora.dropout is {self.dropout}; it must be at least 0 and less than 1.")
        if isinstance(self.targets, str) and self.targets != ALL_LINEAR:
            self.targets = [name.strip() for name in self.targets.split(",") if name.strip()]
        if not self.targets:
            raise InputError("model.lora.targets is empty; name layers such as [q_proj, v_proj], or all-linear.")


def linear_names(model: PreTrainedModel) -> list[str]:
    """Return the short names of the decoder's linear layers, such as `q_proj`; sorted, without the head."""
    head = model.get_output_embeddings()
    return sorted(
        {
            name.rsplit(".", 1)[-1]
            for name, module in model.named_modules()
            if isinstance(module, torch.nn.Linear) and module is not head
        }
    )


def apply_lora(model: PreTrainedModel, lora: Lora) -> PeftModel:
    """Freeze `model` and put fresh adapters beside its target layers, as fp32 masters.

    Raises:
        InputError: A target names no linear layer of this model.
    """
    from peft import LoraConfig, get_peft_model  # noqa: PLC0415  # costs 0.3 s, only LoRA needs it

    valid = linear_names(model)
    if unknown := [name for name in lora.targets if lora.targets != ALL_LINEAR and name not in valid]:
        raise InputError(
            f"model.lora.targets: {unknown[0]!r} is no linear layer of this model; "
            f"valid are {', '.join(valid)}, or {ALL_LINEAR}."
        )
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=lora.rank,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]  # PEFT only ever divides by it
        lora_dropout=lora.dropout,
        target_modules=lora.targets,
        bias=lora.bias,
        use_rslora=lora.variant == "rslora",
        use_dora=lora.variant == "dora",
        init_lora_weights="pissa" if lora.variant == "pissa" else True,
    )
    return get_peft_model(model, config)


def load_adapter(model: PreTrainedModel, directory: str) -> PeftModel:
    """Put the adapters of a PEFT `directory` beside `model`, trainable, as fp32 masters.

    Raises:
        InputError: No adapter there, weights that are not safetensors, or shapes of another base model.
    """
    from peft import PeftModel  # noqa: PLC0415
    from safetensors import SafetensorError  # noqa: PLC0415

    folder = Path(directory)
    if not (folder / "adapter_config.json").is_file():
        raise InputError(f"model.adapter: {directory} holds no adapter_config.json; name a PEFT adapter directory.")
    if not (folder / "adapter_model.safetensors").is_file():
        raise InputError(
            f"model.adapter: {directory} holds no adapter_model.safetensors; only safetensors are read, never pickles."
        )
    try:
        return PeftModel.from_pretrained(model, directory, is_trainable=True, local_files_only=True)
    except (RuntimeError, ValueError, TypeError, KeyError, SafetensorError) as error:
        first_line = str(error).strip().splitlines()[0]
        raise InputError(f"model.adapter: {directory} does not fit this base model: {first_line}") from error


def keep_activations_half(model: torch.nn.Module) -> None:
    """Stop PEFT from casting the inputs of fp32 adapters to fp32, which a fifth of the peak memory goes to.

    NOTE: only for a forward pass under autocast, which casts the adapters' weights instead; without it, dtypes clash.
    """
    for module in model.modules():
        if hasattr(module, "cast_input_dtype_enabled"):
            vars(module)["cast_input_dtype_enabled"] = False


def is_adapter_parameter(name: str) -> bool:
    """Tell whether a parameter of this name belongs to an adapter (PEFT's own naming)."""
    return "lora_" in name


def count_parameters(model: torch.nn.Module) -> tuple[int, int]:
    """Return (total, trainable) numbers of parameters; a 4-bit weight counts as the numbers it stands for."""
    total = trainable = 0
    for parameter in model.parameters():
        count = _logical_numel(parameter)
        total += count
        trainable += count if parameter.requires_grad else 0
    return total, trainable


def _logical_numel(parameter: torch.nn.Parameter) -> int:
    # bitsandbytes packs two 4-bit weights in a byte and keeps the real shape in `quant_state`.
    state: Any = getattr(parameter, "quant_state", None)
    return int(torch.Size(state.shape).numel()) if state is not None else parameter.numel()
