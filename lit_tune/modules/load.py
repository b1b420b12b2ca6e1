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
INDEX = "model.safetensors.index.json"
FLOATS = ("F64", "F32", "F16", "BF16")
# More is no LLaMA, and transformers would be busy for hours making what so small a file asks for.
MOST = {"num_hidden_layers": 1000, "num_labels": 1000}
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
    directory = base_directory(base)
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers' own and many others: the file holds what somebody wrote
        raise InputError(f"model.base: {directory}/config.json describes no model: {_one_line(error)}") from error
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


def local_directory(base: str) -> str | None:
    """Return the directory of `base` if it lies on this machine already, as a directory or in a cache; else None."""
    import huggingface_hub as hub  # noqa: PLC0415

    try:
        snapshot = base if Path(base).is_dir() else hub.snapshot_download(base, local_files_only=True)
    except (hub.errors.LocalEntryNotFoundError, hub.errors.HFValidationError):
        return None
    return snapshot if (Path(snapshot) / "config.json").is_file() else None


def has_tokenizer(base: str) -> bool:
    """Tell whether the tokenizer of `base` lies on this machine, so that nothing needs to be fetched or prepared."""
    if base == smollm2.NAME:
        return smollm2.is_prepared()
    directory = local_directory(base) if base not in shapes() else None
    return directory is not None and any(Path(directory).glob("tokenizer*"))


def is_local(base: str) -> bool:
    """Tell whether other tools find `base` by its directory on this machine rather than by a hub id."""
    return Path(base).is_dir() or base == smollm2.NAME


def read_object(path: Path, setting: str) -> dict[str, Any]:
    """Read a JSON object that came with a model.

    Raises:
        InputError: It is none; `setting` is what named the model.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{setting}: {path} is no JSON object: {_one_line(error)}") from error
    if not isinstance(value, dict):
        raise InputError(f"{setting}: {path} is no JSON object, but one {type(value).__name__}.")
    return value


def _checked(directory: str) -> str:
    folder = Path(directory)
    has_adapter = (folder / "adapter_config.json").is_file()
    if not (folder / "config.json").is_file():
        hint = " It is an adapter: name it as model.adapter." if has_adapter else ""
        raise InputError(f"model.base: {directory} holds no config.json, so it is no transformers model.{hint}")
    if has_adapter:  # transformers would put it into the model without a word
        raise InputError(
            f"model.base: {directory} holds an adapter beside the model; move adapter_config.json and its weights to a "
            "directory of their own, and name that as model.adapter."
        )
    _check_config(folder)
    _check_weight_files(folder)
    return directory


def _check_config(folder: Path) -> None:
    config = read_object(folder / "config.json", "model.base")
    architectures = [str(name) for name in _as_list(config.get("architectures"))]
    if architectures and not any(name.endswith(("ForCausalLM", "LMHeadModel")) for name in architectures):
        raise InputError(
            f"model.base: {folder} is a {architectures[0]}, not a causal language model; "
            "name a LLaMA-family model, such as a LlamaForCausalLM."
        )
    for key, value in config.items():
        if key in MOST and isinstance(value, int) and value > MOST[key]:
            raise InputError(f"model.base: {folder}/config.json says {key} {value}; at most {MOST[key]} is possible.")
        # transformers loads and runs a kernel of the hub that is named so.
        if key.endswith("_implementation") and "/" in str(value):
            raise InputError(
                f"model.base: {folder}/config.json names code of a hub, {key} {value!r}, which is never run; remove it."
            )


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]


def _check_weight_files(folder: Path) -> None:
    """See that all weights lie in safetensors files of the directory itself."""
    if not any(folder.glob("*.safetensors")):
        raise InputError(
            f"model.base: {folder} holds no safetensors; weights are never read from pickles (.bin, .pt). "
            "Convert them once with `save_pretrained` of a transformers that you trust."
        )
    named = _as_list(read_object(folder / "config.json", "model.base").get("transformers_weights"))
    if (folder / INDEX).is_file():
        parts = read_object(folder / INDEX, "model.base").get("weight_map")
        named += sorted({str(name) for name in parts.values()}) if isinstance(parts, dict) else [None]
    for name in named:
        if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
            raise InputError(
                f"model.base: {folder} names {name!r} as a file of weights; only .safetensors files beside its "
                "config.json are read."
            )
        if not (folder / name).is_file():
            raise InputError(f"model.base: {folder} lacks {name}, which {INDEX} names; copy the whole model.")


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
        InputError: No tokenizer there, one without an end-of-sequence token, or with more tokens than the model.
    """
    from transformers import AutoTokenizer  # noqa: PLC0415

    try:
        tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # whatever transformers and tokenizers stumble over in files that somebody wrote
        raise InputError(f"model.base: no tokenizer could be read from {directory}: {_one_line(error)}") from error
    if tokenizer.eos_token_id is None:
        raise InputError(
            f"model.base: the tokenizer of {directory} has no end-of-sequence token, so a model would never learn to "
            "stop; set eos_token in its tokenizer_config.json."
        )
    if (Path(directory) / "config.json").is_file():
        _check_vocabulary(tokenizer, directory)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _check_vocabulary(tokenizer: PreTrainedTokenizerBase, directory: str) -> None:
    """Refuse a token without an embedding: it would end the run at the first text that has it."""
    embeddings = load_config(directory).get_text_config().vocab_size
    token, highest = max(tokenizer.get_vocab().items(), key=lambda item: item[1])
    if highest >= embeddings:
        raise InputError(
            f"model.base: the tokenizer of {directory} has {highest + 1} tokens, its model {embeddings} embeddings, "
            f"none for {token!r}; take the tokenizer that came with the model, or resize the embeddings and save both."
        )


def load_llama(
    directory: str, *, dtype: torch.dtype, quantize: Quantize = "none", attention_name: str = "auto"
) -> PreTrainedModel:
    """Load the causal language model of a base directory, in train mode.

    Args:
        dtype: Of the weights that are not quantised; and the compute dtype of those that are.
        quantize: Hold the linear layers in 8 or 4 bits (bitsandbytes), for LoRA over a frozen base.
        attention_name: `auto` for the package's padding-free attention, or a name that transformers knows.

    Raises:
        InputError: Not a causal language model, not all of its weights, or an attention that this transformers does
            not have.
    """
    from transformers import AutoModelForCausalLM  # noqa: PLC0415

    _silence_loading()
    name = _attention(attention_name)
    try:
        _check_numbers(Path(directory))
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            directory,
            dtype=dtype,
            quantization_config=quantization(quantize, dtype),
            attn_implementation=name,
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
            ignore_mismatched_sizes=True,  # told by `_check_complete`, with the name
            output_loading_info=True,
        )
    except (InputError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # whatever transformers stumbles over in files that somebody wrote
        raise InputError(
            f"model.base: {directory} cannot be loaded as a causal language model: {_one_line(error)}"
        ) from error
    model: PreTrainedModel = loaded[0]
    _check_complete(directory, loaded[1])
    # NOTE: from_pretrained returns eval mode and Lightning's fit keeps it: no dropout, and no gradient checkpointing.
    model.train()
    if quantize == "int8":
        _drop_inputs_of_int8(model)
    return model


def _attention(setting: str) -> str:
    """Return the name by which transformers knows an attention function."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS  # noqa: PLC0415

    name = attention.register() if setting == "auto" else setting
    # transformers takes any other name for a repository of the hub, whose code it would run.
    if name not in (known := ["eager", *ALL_ATTENTION_FUNCTIONS.valid_keys()]) or "|" in name:
        choices = ", ".join(["auto", *(choice for choice in known if "|" not in choice and choice != attention.NAME)])
        raise InputError(f"model.attention: {name!r} is not valid; use one of {choices}.")
    return name


def empty_llama(
    config: PreTrainedConfig, *, dtype: torch.dtype, quantize: Quantize = "none", attention_name: str = "auto"
) -> PreTrainedModel:
    """Return what `load_llama` does of an architecture alone: on the meta device, without weights."""
    from transformers import AutoModelForCausalLM  # noqa: PLC0415
    from transformers.integrations.bitsandbytes import replace_with_bnb_linear  # noqa: PLC0415
    from transformers.quantizers.base import get_keys_to_not_convert  # noqa: PLC0415

    name = _attention(attention_name)
    with torch.device("meta"):
        made: Any = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=name)
        if quantize != "none":
            replace_with_bnb_linear(made, get_keys_to_not_convert(made), quantization(quantize, dtype))
            setattr(made, "is_loaded_in_8bit" if quantize == "int8" else "is_loaded_in_4bit", True)
            _drop_inputs_of_int8(made)
    model: PreTrainedModel = made.train()
    return model


def _drop_inputs_of_int8(model: PreTrainedModel) -> None:
    """Have int8 layers forget their inputs, which bitsandbytes keeps for a gradient that frozen weights do not have.

    NOTE: it keeps them as attributes of the autograd node, out of reach of gradient checkpointing and of offloading.
    """
    from bitsandbytes.nn.modules import Linear8bitLt  # noqa: PLC0415

    def forget(_layer: torch.nn.Module, _inputs: Any, output: torch.Tensor) -> None:
        node: Any = output.grad_fn
        if hasattr(node, "tensors"):  # of the CUDA kernels
            node.tensors = (None, None, None)
        if hasattr(node, "A"):  # of the way through dequantised weights, on a CPU
            node.A = None

    for layer in model.modules():
        if isinstance(layer, Linear8bitLt):
            layer.register_forward_hook(forget)


def _check_numbers(folder: Path) -> None:
    """Refuse weights that are no floating-point numbers, unless the model is stored quantised."""
    from safetensors import safe_open  # noqa: PLC0415

    if read_object(folder / "config.json", "model.base").get("quantization_config"):
        return
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as weights:
            for name in weights.keys():  # noqa: SIM118  # a safetensors file is no dict
                if (kind := weights.get_slice(name).get_dtype()) not in FLOATS:
                    raise InputError(f"model.base: {file}: {name} is {kind}; weights are one of {', '.join(FLOATS)}.")


def _check_complete(directory: str, found: dict[str, Any]) -> None:
    """Refuse a model of which transformers has made up weights, or left some out, because the files do not fit.

    Args:
        found: transformers' account of the loading.
    """
    # A layer that config.json does not count; others (old buffers, a head that is tied) are left out rightly.
    left_out = sorted(name for name in found["unexpected_keys"] if ".layers." in name and "rotary_emb" not in name)
    if missing := sorted(found["missing_keys"]):
        fault = f"{len(missing)} weights are missing, such as {missing[0]}"
    elif found["mismatched_keys"]:
        name, stored, expected = min(found["mismatched_keys"])
        fault = f"{name} has the shape {tuple(stored)}, but its config.json makes it {tuple(expected)}"
    elif left_out:
        fault = f"its config.json has no place for {left_out[0]}"
    else:
        return
    raise InputError(f"model.base: the weights in {directory} do not fit its config.json: {fault}; copy it anew.")


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


def _one_line(error: Exception) -> str:
    """Return what an error of another library says, in a line of sensible length; a bare key says nothing by itself."""
    text = " ".join(line.strip() for line in str(error).splitlines() if line.strip())
    named = type(error).__name__ if not text or isinstance(error, LookupError) else ""
    return ": ".join(filter(None, [named, text[:300]]))
