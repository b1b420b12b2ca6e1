"""What a run leaves for other tools: a PEFT adapter or a transformers model, with tokenizer and prompt template.

Written beside its place and renamed, then read back: an empty or half-written result is worse than none.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from lit_tune.data.instruct import InstructData
from lit_tune.errors import SaveError
from lit_tune.modules import load
from lit_tune.modules.llama import LlamaTuner, compute_dtype

TEMPLATE_FILE = "prompt_template.jinja"


def save_result(module: LlamaTuner, data: InstructData, directory: Path, *, precision: str) -> None:
    """Write the trained adapter or model to `directory`, replacing an earlier one there.

    An adapter names its base as plain PEFT can load it: the hub id, or the local directory. A model is stored in the
    dtype that its forward pass computed in, so nothing is lost that training ever saw.

    Raises:
        SaveError: It could not be written, or what was read back is not what was trained.
    """
    partial = directory.with_name(f".{directory.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        _save_model(module, data, partial, precision)
        _save_tokenizer(data, partial)
        _verify(partial)
        shutil.rmtree(directory, ignore_errors=True)
        partial.rename(directory)
    except OSError as error:
        raise SaveError(
            f"{directory}: the result could not be written ({error}); the checkpoints are intact."
        ) from error


def _save_model(module: LlamaTuner, data: InstructData, directory: Path, precision: str) -> None:
    model: Any = module.model
    if module.method == "lora":
        for config in model.peft_config.values():
            local = load.is_local(module.base)
            config.base_model_name_or_path = load.base_directory(module.base) if local else module.base
        model.save_pretrained(str(directory), safe_serialization=True)
        return
    model.generation_config.eos_token_id = data.stop_token_ids()
    dtype = compute_dtype(precision)
    state = {name: tensor.to(dtype) for name, tensor in model.state_dict().items()}
    model.save_pretrained(str(directory), state_dict=state)


def _save_tokenizer(data: InstructData, directory: Path) -> None:
    assert data.prepared is not None
    tokenizer, template = data.prepared.tokenizer, data.prepared.template
    original = tokenizer.chat_template
    try:
        # So that `tokenizer.apply_chat_template` of any tool makes the prompts that the model was trained on.
        tokenizer.chat_template = template.source
        tokenizer.save_pretrained(str(directory))
    finally:
        tokenizer.chat_template = original
    (directory / TEMPLATE_FILE).write_text(template.source)


def _verify(directory: Path) -> None:
    """Read the weights back: there are some, and all are finite."""
    files = sorted(directory.glob("*.safetensors"))
    tensors = 0
    for file in files:
        with safe_open(file, framework="pt") as weights:
            for name in weights.keys():  # noqa: SIM118  # a safetensors file is no dict
                tensors += 1
                if not bool(torch.isfinite(weights.get_tensor(name)).all()):
                    raise SaveError(f"{file.name}: {name} holds NaN or infinite values; the checkpoints are intact.")
    if not tensors:
        raise SaveError("the result holds no weights; the checkpoints are intact.")
