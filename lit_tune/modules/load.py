"""From `--model.base` to a model and its tokenizer: a hub id, a local directory, or `smollm2-135m`.

Everything ends as a local directory of config, tokenizer and safetensors first (`base_directory`), so that what follows
touches no network and no pickle, and several processes read the same files. Code from a hub is never run.
"""

from __future__ import annotations

import hashlib
import json
import logging
from functools import cache
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from lit_tune.errors import InputError
from lit_tune.modules import attention, smollm2

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

Quantize = Literal["none", "int8", "nf4", "fp4"]

HUB_PATIENCE_S = 4.0
WANTED_FILES = ["*.json", "*.safetensors", "*.jinja", "tokenizer.model", "*.txt"]


@cache
def shapes() -> dict[str, dict[str, Any]]:
    """Return the shipped architecture figures by short name, such as `llama2-7b`; made of `config.json` keys."""
    folder = resources.files("lit_tune") / "shapes"
    return {
        file.name.removesuffix(".json"): json.loads(file.read_text())
        for file in sorted(folder.iterdir(), key=lambda file: file.name)
        if file.name.endswith(".json")
    }


def known_shape(base: str) -> dict[str, Any] | None:
    """Return the shipped figures of a base by its short name or hub id; None if it is not known."""
    for name, shape in shapes().items():
        if base == name or base.lower() in (hub_id.lower() for hub_id in shape["hub_ids"]):
            return {key: value for key, value in shape.items() if key != "hub_ids"}
    return None


def load_config(base: str) -> PreTrainedConfig:
    """Return the architecture of `base` without its weights; offline for the models whose shapes are shipped."""
    from transformers import AutoConfig, LlamaConfig  # noqa: PLC0415

    shape = None if Path(base).is_dir() else known_shape(base)
    if shape is not None:
        return LlamaConfig(**shape)
    config: PreTrainedConfig = AutoConfig.from_pretrained(
        base_directory(base), local_files_only=True, trust_remote_code=False
    )
    return config


def base_directory(base: str) -> str:
    """Return the local directory that holds config, tokenizer and safetensors of `base`; fetch or prepare it if needed.

    Raises:
        InputError: No such directory or model, no safetensors, the hub out of reach, or access to be asked for.
    """
    if Path(base).is_dir():
        return _checked(str(Path(base).resolve()))
    if base == smollm2.NAME:
        return str(smollm2.prepared_directory())
    if base in shapes():
        ids = shapes()[base]["hub_ids"]
        raise InputError(
            f"model.base: {base} names an architecture whose figures come with lit-tune, not its weights; "
            f"for weights name the hub id, such as {ids[0]}, or a local directory."
        )
    if base.startswith((".", "/", "~")) or base.count("/") > 1 or not base.strip():
        raise InputError(f"model.base: there is no directory {base!r}; name a directory, a hub id or {smollm2.NAME}.")
    return _hub_snapshot(base)


def is_local(base: str) -> bool:
    """Tell whether other tools find `base` by its directory on this machine rather than by a hub id."""
    return Path(base).is_dir() or base == smollm2.NAME


def _checked(directory: str) -> str:
    folder = Path(directory)
    if not (folder / "config.json").is_file():
        hint = " It is an adapter: name it as model.adapter." if (folder / "adapter_config.json").is_file() else ""
        raise InputError(f"model.base: {directory} holds no config.json, so it is no transformers model.{hint}")
    _check_causal_lm(folder)
    if not any(folder.glob("*.safetensors")):
        raise InputError(
            f"model.base: {directory} holds no safetensors; weights are never read from pickles (.bin, .pt). "
            "Convert them once with `save_pretrained` of a transformers that you trust."
        )
    return directory


def _check_causal_lm(folder: Path) -> None:
    try:
        architectures = json.loads((folder / "config.json").read_text()).get("architectures") or []
    except (json.JSONDecodeError, UnicodeDecodeError, AttributeError) as error:
        raise InputError(f"model.base: {folder}/config.json is no JSON object: {_first_line(error)}") from error
    if architectures and not any(name.endswith(("ForCausalLM", "LMHeadModel")) for name in architectures):
        raise InputError(
            f"model.base: {folder} is a {architectures[0]}, not a causal language model; "
            "name a LLaMA-family model, such as a LlamaForCausalLM."
        )


def _hub_snapshot(base: str) -> str:
    import huggingface_hub as hub  # noqa: PLC0415
    from huggingface_hub import errors  # noqa: PLC0415

    try:
        return _checked(hub.snapshot_download(base, allow_patterns=WANTED_FILES, local_files_only=True))
    except (errors.LocalEntryNotFoundError, InputError):
        pass  # nothing or only a part of it in the cache: ask the hub
    except errors.HFValidationError as error:
        raise InputError(f"model.base: {base!r} is no directory and no valid hub id.") from error
    try:
        # One quick question first: a download retries for most of a minute where there is no network.
        hub.HfApi().model_info(base, timeout=HUB_PATIENCE_S)
        return _checked(hub.snapshot_download(base, allow_patterns=WANTED_FILES))
    except errors.GatedRepoError as error:
        raise InputError(
            f"model.base: access to {base} must be granted first: accept its licence on the model's hub page, "
            "then run `hf auth login` or set HF_TOKEN."
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise InputError(
            f"model.base: the hub knows no model {base!r}, or it is private: check the name; for a private one run "
            f"`hf auth login`. A local directory or {smollm2.NAME} needs no hub."
        ) from error
    except (errors.HfHubHTTPError, errors.OfflineModeIsEnabled, OSError) as error:
        raise _out_of_reach(base, error) from error
    except Exception as error:
        if type(error).__module__.split(".")[0] in ("httpx", "httpx2", "httpcore", "httpcore2", "requests"):
            raise _out_of_reach(base, error) from error
        raise


def _out_of_reach(base: str, error: Exception) -> InputError:
    return InputError(
        f"model.base: {base} is not in the local cache and the hub is out of reach ({type(error).__name__}); connect, "
        f"or name a local directory, or {smollm2.NAME}, which needs no hub."
    )


def fingerprint(directory: str) -> str:
    """Return a short hash that tells base models apart: of config, sizes, and slices of the weights.

    Not a checksum of all weights: hashing 140 GB before every run would take minutes.
    """
    digest = hashlib.sha256((Path(directory) / "config.json").read_bytes())
    for file in sorted(Path(directory).glob("*.safetensors")):
        size = file.stat().st_size
        digest.update(f"{file.name}:{size}".encode())
        with file.open("rb") as stream:
            for i in range(16):
                stream.seek(i * size // 16)
                digest.update(stream.read(65536))
    return digest.hexdigest()[:16]


def load_tokenizer(directory: str) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a base directory; where none is set, eos serves as padding (masked by length, not by id).

    Raises:
        InputError: No tokenizer there, or one without an end-of-sequence token.
    """
    from transformers import AutoTokenizer  # noqa: PLC0415

    try:
        tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"model.base: no tokenizer could be read from {directory}: {_first_line(error)}") from error
    if tokenizer.eos_token_id is None:
        raise InputError(
            f"model.base: the tokenizer of {directory} has no end-of-sequence token, so a model would never learn to "
            "stop; set eos_token in its tokenizer_config.json."
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_llama(
    directory: str, *, dtype: torch.dtype, quantize: Quantize = "none", attention_name: str = "auto"
) -> PreTrainedModel:
    """Load the causal language model of a base directory, in train mode.

    Args:
        dtype: Of the weights that are not quantised; and the compute dtype of those that are.
        quantize: Hold the linear layers in 8 or 4 bits (bitsandbytes), for LoRA over a frozen base.
        attention_name: `auto` for the package's padding-free attention, or a name that transformers knows.

    Raises:
        InputError: Not a causal language model, or an attention that this transformers does not have.
    """
    from safetensors import SafetensorError  # noqa: PLC0415
    from transformers import AutoModelForCausalLM  # noqa: PLC0415

    _silence_loading()
    name = attention.register() if attention_name == "auto" else attention_name
    try:
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            directory,
            dtype=dtype,
            quantization_config=quantization(quantize, dtype),
            attn_implementation=name,
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
        )
    except (ValueError, KeyError, ImportError, OSError, SafetensorError) as error:
        raise InputError(
            f"model.base: {directory} cannot be loaded as a causal language model: {_first_line(error)}"
        ) from error
    # NOTE: from_pretrained returns eval mode and Lightning's fit keeps it: no dropout, and no gradient checkpointing.
    model.train()
    return model


def quantization(quantize: Quantize, dtype: torch.dtype) -> Any:
    """Return the BitsAndBytesConfig for a setting of `model.quantize`; None for `none`.

    4-bit constants are quantised once more ("double quantisation", QLoRA, arXiv:2305.14314: 0.37 bit a weight less).
    """
    if quantize == "none":
        return None
    from transformers import BitsAndBytesConfig  # noqa: PLC0415

    if quantize == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quantize,
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )


def _silence_loading() -> None:
    from transformers.utils import logging as hf_logging  # noqa: PLC0415

    hf_logging.disable_progress_bar()
    logging.getLogger("transformers").setLevel(logging.ERROR)


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
