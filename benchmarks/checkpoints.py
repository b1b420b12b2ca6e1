"""What saving costs: a LoRA checkpoint of Llama-2-7B's shape, with AdamW's moments; time, disk and memory.

    python benchmarks/checkpoints.py [--base llama2-7b] [--runs 10] [--dir DIRECTORY]

The adapters' tensors are real, with the names and shapes that training gives them; the base has no weights, for no
checkpoint holds them. Lightning's own writer is measured beside ours: it neither syncs nor hashes.
"""

from __future__ import annotations

import argparse
import ctypes
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import CheckpointIO, TorchCheckpointIO
from transformers import AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks.report import figures, header, timed
from lit_tune.callbacks.memory_sources import peak_rss_bytes
from lit_tune.checkpoint import AtomicCheckpointIO, read
from lit_tune.modules.load import load_config
from lit_tune.modules.lora import Lora, apply_lora
from lit_tune.modules.optim import make_optimizer
from lit_tune.quiet import quieten

MIB = 1024**2


def lora_checkpoint(base: str) -> tuple[dict[str, torch.nn.Parameter], dict[str, Any]]:
    """Make the adapters, with their gradients, and what Lightning hands over to be saved after an optimizer step."""
    with torch.device("meta"):
        model = apply_lora(AutoModelForCausalLM.from_config(load_config(base)), Lora())
    adapters = {
        f"model.{name}": torch.nn.Parameter(torch.randn(parameter.shape))
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }
    optimizer = make_optimizer("adamw", adapters.values(), lr=2e-4, weight_decay=0.0, fused=True)
    for parameter in adapters.values():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    return adapters, {
        "global_step": 1,
        "state_dict": {name: parameter.detach() for name, parameter in adapters.items()},
        "optimizer_states": [optimizer.state_dict()],
    }


def tensor_bytes(checkpoint: dict[str, Any]) -> int:
    """Return the bytes of a checkpoint's weights and optimizer state."""
    states = checkpoint["optimizer_states"][0]["state"].values()
    tensors = [*checkpoint["state_dict"].values(), *(tensor for state in states for tensor in state.values())]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def peak_growth_mib(plugin: CheckpointIO, checkpoint: dict[str, Any], path: Path) -> float:
    """Return by how much the process' memory grew at most during a save."""
    status = Path("/proc/self/status")
    ctypes.CDLL(None).malloc_trim(0)  # memory that the C library keeps for reuse would hide as much growth
    Path("/proc/self/clear_refs").write_text("5")  # the peak is from now on
    before = peak_rss_bytes(status.read_text())
    plugin.save_checkpoint(checkpoint, path)
    plugin.teardown()
    return (peak_rss_bytes(status.read_text()) - before) / MIB


def measure(name: str, plugin: CheckpointIO, checkpoint: dict[str, Any], path: Path, runs: int) -> None:
    """Save again and again and print the figures."""
    growth_mib = max(peak_growth_mib(plugin, checkpoint, path) for _ in range(3))
    stops, wholes = [], []
    for _ in range(runs):
        started = time.perf_counter()
        stops.append(timed(plugin.save_checkpoint, checkpoint, path))
        plugin.teardown()  # waits for the background
        wholes.append(time.perf_counter() - started)
    figures(f"{name}: training stops", stops)
    figures(f"{name}: until it is in place", wholes)
    print(f"{f'{name}: more memory at the peak':<44} {growth_mib:8.1f} MiB", flush=True)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="llama2-7b", help="a base whose shape is shipped")
    parser.add_argument("--runs", type=int, default=10)
    parser.add_argument("--dir", help="where to write; the system's directory of temporary files if left out")
    arguments = parser.parse_args()
    quieten()
    header()
    adapters, checkpoint = lora_checkpoint(arguments.base)
    size = tensor_bytes(checkpoint)
    count = sum(parameter.numel() for parameter in adapters.values())
    print(f"{arguments.base}, LoRA: {count:,} parameters in {len(adapters)} tensors; with AdamW {size / MIB:.1f} MiB")
    with tempfile.TemporaryDirectory(dir=arguments.dir) as folder:
        path = Path(folder) / "step-00000001.ckpt"
        measure("lit-tune", AtomicCheckpointIO(), checkpoint, path, arguments.runs)
        print(f"{'lit-tune: on disk':<44} {path.stat().st_size / size:8.4f} x the tensors")
        figures("lit-tune: verify and read", [timed(read, path) for _ in range(arguments.runs)])
        measure("asynchronous", AtomicCheckpointIO(asynchronous=True), checkpoint, path, arguments.runs)
        measure("Lightning", TorchCheckpointIO(), checkpoint, path, arguments.runs)


if __name__ == "__main__":
    main()
