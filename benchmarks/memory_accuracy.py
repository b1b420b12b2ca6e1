"""Predicted against measured memory on a CUDA GPU, with random weights in a real model's shape.

    python benchmarks/memory_accuracy.py [--base llama2-7b llama3-8b] [--tokens 512 2048 8192]

Every combination of LoRA (bf16, int8, nf4) and full fine-tuning (8-bit AdamW) with gradient checkpointing none, mlp and
full, for each number of tokens; those that are predicted not to fit are named and left out. Two optimizer steps are
taken; the peak is that of the second. Without a GPU there is nothing to measure: the command says so and ends with 2.
"""

from __future__ import annotations

import argparse
import gc
import sys
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks.report import header
from lit_tune.data.collate import collate
from lit_tune.memory import GIB, bytes_on, optimizer_tensors, weight_tensors
from lit_tune.modules import load
from lit_tune.modules.llama import LlamaTuner, storage_dtype
from lit_tune.modules.optim import make_optimizer
from lit_tune.predict import Case, predict
from lit_tune.remedies import CONTEXT_GIB
from lit_tune.workload import MicroBatch

METHODS: dict[str, dict[str, Any]] = {
    "LoRA": {},
    "LoRA, int8": {"quantize": "int8"},
    "LoRA, nf4": {"quantize": "nf4"},
    "fft, bf16-true, 8-bit AdamW": {"method": "fft", "optimizer": "adamw_8bit"},
}


def with_random_weights(tuner: LlamaTuner, config: Any, precision: str, device: torch.device) -> None:
    """Give a module its model, as `configure_model` does, with random weights made on the device."""
    from bitsandbytes.nn import Int8Params, Linear4bit, Linear8bitLt, Params4bit  # noqa: PLC0415

    dtype = storage_dtype(precision, trains=tuner.method == "fft")
    base = load.empty_llama(config, dtype=dtype, quantize=tuner.quantize, attention_name=tuner.attention)
    for layer in base.modules():
        for name, parameter in list(layer._parameters.items()):
            if parameter is None:
                continue
            random = torch.empty(parameter.shape, dtype=dtype, device=device).normal_(std=0.02)
            made: Any = torch.nn.Parameter(random, requires_grad=parameter.requires_grad)
            if isinstance(layer, Linear4bit):
                made = Params4bit(random.cpu(), requires_grad=False, quant_type=tuner.quantize).to(device)
            elif isinstance(layer, Linear8bitLt):
                made = Int8Params(random.cpu(), requires_grad=False).to(device)
            setattr(layer, name, made)
        for name, buffer in list(layer.named_buffers(recurse=False)):
            layer.register_buffer(name, torch.rand(buffer.shape, device=device), persistent=False)
    base.tie_weights()
    tuner.adopt(base)
    for name, parameter in tuner.named_parameters():
        if parameter.is_meta:
            raise RuntimeError(f"{name} has no weights")
    tuner.to(device)


def measure(case: Case, device: torch.device) -> dict[str, int]:
    """Take two optimizer steps and return bytes: weights, optimizer, and the peak of the second step."""
    tuner = case.tuner
    tuner.trainer = SimpleNamespace(precision=case.precision)  # type: ignore[assignment]
    with_random_weights(tuner, case.config, case.precision, device)
    ids = [torch.randint(0, 1000, (length,)).numpy() for length in case.micro.lengths]
    samples = [(tokens, np.concatenate([[-100], tokens[1:]])) for tokens in ids]
    batch = collate(samples, packing=True, pad_token_id=0)
    batch = {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in batch.items()}
    optimizer = make_optimizer(tuner.optimizer, tuner.parameters(), lr=1e-5, weight_decay=0.0, fused=True)
    for _ in range(2):
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=case.precision.endswith("mixed")):
            nll = tuner.nll(batch)
        (nll * 1e-3).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return {
        "weights": bytes_on(device, weight_tensors(tuner)),
        "optimizer": bytes_on(device, optimizer_tensors(optimizer)),
        "peak": torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0,
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", nargs="+", default=["llama2-7b", "llama3-8b"])
    parser.add_argument("--tokens", nargs="+", type=int, default=[512, 2048, 8192])
    arguments = parser.parse_args()
    header()
    if not torch.cuda.is_available():
        print("There is no CUDA GPU here: nothing to measure.", file=sys.stderr)
        sys.exit(2)
    device = torch.device("cuda", 0)
    off = []
    for base, (method, settings), again, tokens in product(
        arguments.base, METHODS.items(), ("none", "mlp", "full"), arguments.tokens
    ):
        name = f"{base}, {method}, checkpointing {again}, {tokens:,} tokens"
        tuner = LlamaTuner(base=base, gradient_checkpointing=again, **settings)
        precision = "bf16-true" if tuner.method == "fft" else "bf16-mixed"
        micro = MicroBatch((tokens // 4,) * 4, tokens - 4)
        case = Case(tuner, load.load_config(base), micro, precision)
        told = predict(case)
        room = torch.cuda.mem_get_info(device)[0] / GIB - CONTEXT_GIB
        if told.peak.total / GIB > room:
            print(f"{name}: {told.peak.total / GIB:.2f} GiB predicted, {room:.2f} are free: left out", flush=True)
            continue
        found = measure(case, device)
        off.append(found["peak"] / told.peak.total - 1)
        print(
            f"{name}: peak {found['peak'] / GIB:.2f} GiB, predicted {told.peak.total / GIB:.2f} ({off[-1]:+.1%}); "
            f"weights off by {found['weights'] - told.weights:,} bytes",
            flush=True,
        )
        del case, tuner
        gc.collect()
        torch.cuda.empty_cache()
    print(f"\npeak off by {min(off):+.1%} to {max(off):+.1%} in {len(off)} combinations")


if __name__ == "__main__":
    main()
