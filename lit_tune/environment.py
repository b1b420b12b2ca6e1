"""What a figure was measured with: versions, devices, memory; without names, paths or secrets."""

from __future__ import annotations

import os
import platform
import shutil
from importlib import metadata
from pathlib import Path

# In the order in which a maintainer wants to read them.
PACKAGES = [
    *("lit-tune", "torch", "lightning", "transformers", "peft", "bitsandbytes", "accelerate", "datasets", "tokenizers"),
    *("safetensors", "torchmetrics", "tensorboard", "jsonargparse", "numpy"),
]
GIB = 1024**3


def environment() -> dict[str, str]:
    """Return what a bug report needs by name."""
    import psutil  # noqa: PLC0415
    import torch  # noqa: PLC0415

    memory, disk = psutil.virtual_memory(), shutil.disk_usage(Path.cwd())
    cores = len(os.sched_getaffinity(0))
    found = {
        "python": f"{platform.python_version()} ({platform.python_implementation()})",
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        **{package: _installed(package) for package in PACKAGES},
        "cpu": f"{cores} usable cores, {torch.get_num_threads()} torch threads",
        "memory": f"{memory.total / GIB:.1f} GiB, {memory.available / GIB:.1f} GiB available",
        "disk here": f"{disk.free / GIB:.1f} GiB free",
        "cuda": str(torch.version.cuda or "none in this torch"),
    }
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        free, total = torch.cuda.mem_get_info(index)
        found[f"gpu {index}"] = f"{properties.name}, {total / GIB:.1f} GiB, {free / GIB:.1f} GiB free"
    return found


def _installed(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"
