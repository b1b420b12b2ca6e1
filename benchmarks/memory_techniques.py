"""What each technique saves and costs, predicted: the table of docs/memory.md.

    python benchmarks/memory_techniques.py [--base llama2-7b] [--tokens 2048]

Four samples make up the tokens, all with labels. Nothing is measured: these are the figures of `lit-tune plan`.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks.report import header
from lit_tune.memory import GIB
from lit_tune.modules.llama import LlamaTuner
from lit_tune.modules.load import load_config
from lit_tune.predict import Case, predict
from lit_tune.remedies import flops_per_token
from lit_tune.workload import MicroBatch

LORA: dict[str, dict[str, Any]] = {
    "LoRA": {},
    "+ checkpointing of every 4th layer": {"gradient_checkpointing": 4},
    "+ checkpointing mlp": {"gradient_checkpointing": "mlp"},
    "+ checkpointing of every 2nd layer": {"gradient_checkpointing": 2},
    "+ checkpointing full": {"gradient_checkpointing": "full"},
    "+ activations offloaded": {"offload_activations": True},
    "+ int8 base": {"quantize": "int8"},
    "+ nf4 base": {"quantize": "nf4"},
    "+ nf4 base, checkpointing full": {"quantize": "nf4", "gradient_checkpointing": "full"},
}
FULL = {"method": "fft", "gradient_checkpointing": "full"}
FFT: dict[str, dict[str, Any]] = {
    "full fine-tuning": {"method": "fft"},
    "+ checkpointing full": FULL,
    "+ checkpointing full, accumulation": FULL | {"accumulate": 2},
    "+ checkpointing full, 8-bit AdamW": FULL | {"optimizer": "adamw_8bit"},
    "+ checkpointing full, Adafactor": FULL | {"optimizer": "adafactor"},
    "+ checkpointing full, SGD": FULL | {"optimizer": "sgd"},
    "+ checkpointing full, step in backward": FULL | {"optimizer_in_backward": True},
    "+ checkpointing full, bf16-true": FULL | {"precision": "bf16-true"},
    "+ the three: 8-bit AdamW, in backward, bf16-true": FULL
    | {"optimizer": "adamw_8bit", "optimizer_in_backward": True, "precision": "bf16-true"},
    "+ checkpointing full, fsdp2_cpu_offload": FULL | {"strategy": "fsdp2_cpu_offload"},
    "+ checkpointing full, fsdp2 on 4 GPUs": FULL | {"strategy": "fsdp2", "devices": 4},
}


def main() -> None:
    """Predict and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="llama2-7b")
    parser.add_argument("--tokens", type=int, default=2048)
    arguments = parser.parse_args()
    header()
    config = load_config(arguments.base)
    micro = MicroBatch((arguments.tokens // 4,) * 4, arguments.tokens)
    print(f"{arguments.base}, {arguments.tokens:,} tokens a micro-batch, bf16-mixed, GiB\n")
    columns = ("weights", "gradients", "optimizer", "activations", "peak", "on the host", "compute")
    print("| | " + " | ".join(columns) + " |\n|---|" + "---:|" * len(columns))
    for rows in (LORA, FFT):
        least = 0.0
        for name, settings in rows.items():
            of = {key: settings[key] for key in ("strategy", "devices", "accumulate") if key in settings}
            tuner = {key: value for key, value in settings.items() if key not in {*of, "precision"}}
            precision = settings.get("precision", "bf16-mixed")
            case = Case(LlamaTuner(base=arguments.base, **tuner), config, micro, precision, **of)
            found = predict(case)
            flops = flops_per_token(case, found)
            least = least or flops
            sizes = (found.weights, found.gradients, found.optimizer, found.activations, found.peak.total, found.host)
            cells = " | ".join(f"{size / GIB:.2f}" for size in sizes)
            print(f"| {name} | {cells} | x {flops / least:.2f} |")


if __name__ == "__main__":
    main()
