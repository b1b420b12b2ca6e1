"""Train the tiny Llama once for each of several cuts of one global batch, in this process or as one of several ranks.

`python -m tests.reliability.splits JOB.json`: the job names base, records and cuts; rank 0 writes beside it.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from lit_tune.data.instruct import InstructData
from lit_tune.modules.llama import LlamaTuner
from lit_tune.modules.lora import Lora
from tests.tiny_run import Watch, train

EPOCHS = 2


@dataclass(frozen=True)
class Split:
    """How the global batch is cut, for one method."""

    world: int
    accumulate: int
    samples: int | None = None
    tokens: int | None = None
    packing: bool = True
    method: str = "lora"
    dropout: float = 0.0
    strategy: str = "auto"

    def __str__(self) -> str:
        size = f"{self.samples} samples" if self.samples else f"{self.tokens} tokens"
        kind = "packed" if self.packing else "padded"
        on = f"{self.world} rank(s) by {self.strategy}"
        return f"{self.method}, {on} x {self.accumulate} x {size}, {kind}, dropout {self.dropout}"


@dataclass
class Seen:
    """What a run did."""

    losses: list[float]
    gradients: list[torch.Tensor]  # of each step, before clipping, all in one vector
    weights: list[torch.Tensor]  # before the first step, then after each
    val_loss: float


def run_split(split: Split, base: str, records: str) -> Seen:
    """Train and validate one split in the ranks that exist."""
    watch = Watch()
    module = LlamaTuner(
        base=base,
        method=split.method,  # type: ignore[arg-type]
        lora=Lora(rank=4, alpha=8, dropout=split.dropout, targets=["q_proj", "v_proj"]),
        learning_rate=1e-3,
    )
    data = InstructData(
        path=records,
        template="chatml",
        micro_batch_size=split.samples,
        micro_batch_tokens=split.tokens,
        packing=split.packing,
        val_fraction=0.3,
    )
    settings: dict[str, Any] = {"max_epochs": EPOCHS, "accumulate_grad_batches": split.accumulate}
    settings |= {"devices": split.world, "strategy": split.strategy}
    trainer = train(module, data, watch, **settings)
    weights = [torch.cat([weight.flatten() for weight in each.values()]) for each in watch.weights]
    return Seen(watch.losses, watch.gradients, weights, float(trainer.callback_metrics["val/loss"]))


def run_in_ranks(splits: list[Split], *, world: int, base: str, records: str, directory: Path) -> list[Seen]:
    """Run splits one after the other in `world` processes of their own."""
    job = directory / f"job-{world}.json"
    job.write_text(json.dumps({"base": base, "records": records, "splits": [asdict(split) for split in splits]}))
    in_ranks("tests.reliability.splits", job, world=world)
    seen: list[Seen] = [Seen(**one) for one in torch.load(job.with_suffix(".pt"), weights_only=True)]
    return seen


def in_ranks(module: str, job: Path, *, world: int) -> None:
    """Run a module on a job in `world` processes, as torchrun would."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(world)}
    command = [sys.executable, "-m", module, str(job)]
    ranks = [
        subprocess.Popen(
            command,
            env=shared | {"RANK": str(rank), "LOCAL_RANK": str(rank), "TORCHELASTIC_RUN_ID": module},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(world)
    ]
    said = [rank.communicate()[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0] * world, "\n".join(said)


def main(job: Path) -> None:
    """Do the job of one rank."""
    torch.set_num_threads(1)
    asked = json.loads(job.read_text())
    seen = [vars(run_split(Split(**split), asked["base"], asked["records"])) for split in asked["splits"]]
    if os.environ["RANK"] == "0":
        torch.save(seen, job.with_suffix(".pt"))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
