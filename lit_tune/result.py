"""What a run leaves for other tools: a PEFT adapter or a transformers model, with tokenizer and prompt template.

Written beside its place and renamed, then read back: an empty or half-written result is worse than none.
"""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lit_tune.data.instruct import InstructData
from lit_tune.errors import SaveError
from lit_tune.modules import load
from lit_tune.modules.llama import LlamaTuner, compute_dtype

TEMPLATE_FILE = "prompt_template.jinja"
RUN_FILE = "run.json"


def save_result(
    module: LlamaTuner,
    data: InstructData,
    directory: Path,
    *,
    precision: str,
    state: Mapping[str, Tensor] | None = None,
) -> None:
    """Write the trained adapter or model to `directory`, replacing an earlier one there.

    An adapter names its base as plain PEFT can load it: the hub id, or the local directory. A model is stored in the
    dtype that its forward pass computed in, so nothing is lost that training ever saw.

    Args:
        state: The module's whole state dict, where the module itself holds only a shard of it.

    Raises:
        SaveError: It could not be written, or what was read back is not what was trained.
    """
    partial = directory.with_name(f".{directory.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        weights = {name.removeprefix("model."): t for name, t in (state or module.state_dict()).items()}
        _save_model(module, data, partial, precision, weights)
        _save_tokenizer(data, partial)
        (partial / RUN_FILE).write_text(json.dumps({"optimizer_steps": module.trainer.global_step}) + "\n")
        _verify(partial)
        shutil.rmtree(directory, ignore_errors=True)
        partial.rename(directory)
    except (OSError, SafetensorError) as error:
        raise SaveError(
            f"{directory}: the result could not be written ({error}); the checkpoints are intact."
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def steps_of(directory: Path) -> int | None:
    """Return the optimizer steps that a result was trained for; None where there is none."""
    try:
        return int(json.loads((directory / RUN_FILE).read_text())["optimizer_steps"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _save_model(
    module: LlamaTuner, data: InstructData, directory: Path, precision: str, weights: Mapping[str, Tensor]
) -> None:
    model: Any = module.model
    if module.method == "lora":
        for config in model.peft_config.values():
            local = load.is_local(module.base)
            config.base_model_name_or_path = load.base_directory(module.base) if local else module.base
        model.save_pretrained(str(directory), safe_serialization=True, state_dict=weights)
        return
    model.generation_config.eos_token_id = data.stop_token_ids()
    dtype = compute_dtype(precision)
    state = {name: tensor.to(dtype) for name, tensor in weights.items()}
    model.save_pretrained(str(directory), state_dict=state)
    # NOTE: transformers has written the dtype of the model in memory, in which it would load the weights again.
    config = copy.deepcopy(model.config)
    config.dtype = dtype
    config.save_pretrained(str(directory))


def _save_tokenizer(data: InstructData, directory: Path) -> None:
    assert data.prepared is not None
    tokenizer = data.prepared.tokenizer
    original = tokenizer.chat_template
    try:
        tokenizer.chat_template = _chat_template(data)
        (directory / TEMPLATE_FILE).write_text(tokenizer.chat_template)
        tokenizer.save_pretrained(str(directory))
    finally:
        tokenizer.chat_template = original


def _chat_template(data: InstructData) -> str:
    """Return the template with which `tokenizer.apply_chat_template` of any tool makes the prompts of training.

    It adds no bos, and SentencePiece writes no space before a word behind one; where the tokenizer did that by itself
    in training, it has to stand in the template. Which of it, is found by trying.
    """
    assert data.prepared is not None
    tokenizer, source = data.prepared.tokenizer, data.prepared.template.source
    for start in ("", "{{ bos_token }}", "{{ bos_token + ' ' }}"):
        # The comment takes the line break with it: a template may begin with an indented block.
        candidate = f"{start}{{# before every text, as in training #}}\n{source}" if start else source
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": "x"}],
            chat_template=candidate,
            add_generation_prompt=True,
            return_dict=False,
        )
        if prompt == data.encode_prompt("x"):
            return candidate
    return source  # one that looks at today's date, for example


def _verify(directory: Path) -> None:
    """Read the weights back: there are some, and all are finite."""
    files = sorted(directory.glob("*.safetensors"))
    tensors = 0
    for file in files:
        with safe_open(file, framework="pt") as weights:
            for name in weights.keys():  # noqa: SIM118  # a safetensors file is no dict
                tensors += 1
                if not bool(torch.isfinite(weights.get_tensor(name)).all()):
                    raise SaveError(f"{file.name}: {name} holds NaN or infinite values")
    if not tensors:
        raise SaveError("it holds no weights")
