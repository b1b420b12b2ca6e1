"""LoRA: small trainable matrices beside frozen weights, put there by PEFT.

A frozen weight `W` of shape (out, in) gets `B @ A` added, with `A` (rank, in) and `B` (out, rank). Only A and B need
gradients and optimizer state, so both cost `rank * (in + out)` instead of `in * out` parameters a layer. Paper: Hu et
al., "LoRA: Low-Rank Adaptation of Large Language Models", arXiv:2106.09685.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from lit_tune.errors import InputError
from lit_tune.modules import load

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

ALL_LINEAR = "all-linear"
CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"

# What is read of an adapter_config.json. PEFT knows more there, some of which imports modules or reads pickles by name.
READ_KEYS = (
    *("r", "lora_alpha", "lora_dropout", "target_modules", "exclude_modules", "bias", "use_rslora", "use_dora"),
    *("rank_pattern", "alpha_pattern", "layers_to_transform", "layers_pattern", "modules_to_save", "init_lora_weights"),
)
# What says nothing about what the adapter computes; the last three are written where nobody asked for them.
OTHER_KEYS = (
    *("peft_type", "task_type", "base_model_name_or_path", "revision", "inference_mode", "peft_version"),
    *("auto_mapping", "megatron_core", "qalora_group_size"),
)
INITS = (True, False, "gaussian", "orthogonal", "pissa")


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
        if not self.alpha > 0:
            raise InputError(f"model.lora.alpha is {self.alpha}; it must be more than 0, or the adapters do nothing.")
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


def settings_of(directory: str) -> Lora:
    """Return the settings that a PEFT `directory` was made with, as far as they give its adapters their shapes.

    Raises:
        InputError: No adapter there.
    """
    _check_files(Path(directory))
    found = load.read_object(Path(directory) / CONFIG_FILE, "model.adapter")
    targets = found.get("target_modules")
    return Lora(
        rank=int(found.get("r") or Lora.rank),
        targets=[str(name) for name in targets] if isinstance(targets, list) else str(targets or ALL_LINEAR),
        bias=found.get("bias") or "none",
        variant="dora" if found.get("use_dora") else "lora",
    )


def _check_files(folder: Path) -> None:
    if not (folder / CONFIG_FILE).is_file():
        raise InputError(f"model.adapter: {folder} holds no {CONFIG_FILE}; name a PEFT adapter directory.")
    if not (folder / WEIGHTS_FILE).is_file():
        raise InputError(f"model.adapter: {folder} holds no {WEIGHTS_FILE}; only safetensors are read, never pickles.")


def load_adapter(model: PreTrainedModel, directory: str) -> PeftModel:
    """Put the adapters of a PEFT `directory` beside `model`, trainable, as fp32 masters.

    Raises:
        InputError: No adapter there, weights that are not safetensors, settings that are no plain LoRA's, or an
            adapter of another base model.
    """
    from peft import get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict  # noqa: PLC0415

    folder = Path(directory)
    _check_files(folder)
    base = str(model.name_or_path)
    trained_on = ""
    try:
        settings = load.read_object(folder / CONFIG_FILE, "model.adapter")
        trained_on = str(settings.get("base_model_name_or_path") or "")
        _check_base(trained_on, base)
        config = _lora_config(settings)
        tensors = _read_weights(folder / WEIGHTS_FILE, config)
        adapted: PeftModel = get_peft_model(model, config)
        expected = get_peft_model_state_dict(adapted, save_embedding_layers=False)
        if fault := next(_differences(tensors, expected), None):
            raise InputError(fault)
        set_peft_model_state_dict(adapted, tensors)
    except MemoryError:
        raise
    except Exception as error:  # whatever PEFT stumbles over in files that somebody wrote
        both = f" {base} (it was trained on {trained_on!r})" if trained_on else ""
        said = " ".join(str(error).split()).removeprefix("model.adapter: ")
        raise InputError(f"model.adapter: {directory} does not fit this base model{both}: {said[:300]}") from error
    return adapted


def _check_base(trained_on: str, base: str) -> None:
    """Refuse an adapter whose own base lies on this machine and is another than `base`."""
    own = load.local_directory(trained_on)
    if own is None or not Path(base).is_dir() or load.fingerprint(own) == load.fingerprint(base):
        return
    raise InputError(f"that is another model; name it as model.base, or start without model.adapter ({own})")


def _lora_config(settings: Mapping[str, Any]) -> Any:
    """Return PEFT's LoraConfig of the known settings of an `adapter_config.json`; the others must be unset."""
    from peft import LoraConfig  # noqa: PLC0415

    if settings.get("peft_type") != "LORA":
        raise InputError(f"its {CONFIG_FILE} has peft_type {settings.get('peft_type')!r}; only LORA can be used")
    for key, value in settings.items():
        if value and key not in (*READ_KEYS, *OTHER_KEYS):
            raise InputError(f"its {CONFIG_FILE} sets {key}, which no plain LoRA needs; set it to null")
    library = str((settings.get("auto_mapping") or {}).get("parent_library", "transformers"))
    if library.partition(".")[0] != "transformers":  # here it is ignored; other tools would import it
        raise InputError(f"its {CONFIG_FILE} names the module {library!r} (auto_mapping), which is no base model's")
    read = {key: settings[key] for key in READ_KEYS if settings.get(key) is not None}
    if (how := read.get("init_lora_weights", True)) not in INITS:
        raise InputError(f"its {CONFIG_FILE} sets init_lora_weights to {how!r}; known are {', '.join(map(str, INITS))}")
    for key in (
        "target_modules",
        "exclude_modules",
        "layers_pattern",
        "modules_to_save",
        "rank_pattern",
        "alpha_pattern",
    ):
        names = read.get(key) or []
        for name in [names] if isinstance(names, str) else names:
            # PEFT takes them as regular expressions, some of which never end.
            if name != ALL_LINEAR and not re.fullmatch(r"[\w.]+", str(name)):
                raise InputError(f"its {CONFIG_FILE} has the pattern {name!r} as {key}; list the names of layers")
    return LoraConfig(task_type="CAUSAL_LM", **read)


def _read_weights(path: Path, config: Any) -> dict[str, Tensor]:
    """Read an adapter's tensors; their ranks must be those of `config`, so that no others are made room for."""
    from safetensors.torch import load_file  # noqa: PLC0415

    tensors = load_file(path)
    ranks = {tensor.shape[0] for name, tensor in tensors.items() if "lora_A" in name}
    said = {config.r, *config.rank_pattern.values()}
    if not ranks or not ranks <= said:
        raise InputError(f"its weights have the ranks {sorted(ranks)}, its {CONFIG_FILE} says {sorted(said)}")
    return tensors


def _differences(tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> Iterator[str]:
    """Yield in which tensors an adapter's file differs from what the model takes."""
    for name in sorted(expected.keys() | tensors.keys()):
        if name not in tensors:
            yield f"it lacks {name}"
        elif name not in expected:
            yield f"it holds {name}, for which this model has no place"
        elif tensors[name].shape != expected[name].shape:
            yield f"{name} is {tuple(tensors[name].shape)} there and {tuple(expected[name].shape)} here"
        elif not tensors[name].is_floating_point() or not bool(torch.isfinite(tensors[name]).all()):
            yield f"{name} holds values that are no finite numbers"


def keep_activations_half(model: torch.nn.Module) -> None:
    """Stop PEFT from casting the inputs of fp32 adapters to fp32, which a fifth of the peak memory goes to.

    NOTE: only for a forward pass under autocast, which casts the adapters' weights instead; without it, dtypes clash.
    """
    for module in model.modules():
        if hasattr(module, "cast_input_dtype_enabled"):
            vars(module)["cast_input_dtype_enabled"] = False


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
