"""The smallest module and loader that obey the batch contract of `lit_tune.data.collate`, for tests of callbacks."""

import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM
from typing_extensions import override

from lit_tune.callbacks.checkpoint import Checkpoint
from lit_tune.callbacks.continuation import Continuation
from lit_tune.callbacks.stop import GracefulStop
from lit_tune.checkpoint import AtomicCheckpointIO, read
from lit_tune.logs import MetricsCsv

Batch = dict[str, Any]
VOCABULARY = 64


def tiny_llama(**settings: Any) -> LlamaForCausalLM:
    """Make a randomly initialised Llama of 2 layers, the same one every time."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        **settings,
    )
    return LlamaForCausalLM(config)


class TinyModule(LightningModule):
    """A tiny Llama trained by SGD on the mean over the supervised tokens of an optimizer step."""

    def __init__(self, attention_dropout: float = 0.0) -> None:
        super().__init__()
        self.model = tiny_llama(attention_dropout=attention_dropout).train()
        self.nll_sums: list[float] = []

    def nll_sum(self, batch: Batch) -> Tensor:
        """Return the sum of the token cross-entropies."""
        logits_BTV = self.model(input_ids=batch["input_ids"]).logits
        return cross_entropy(logits_BTV[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), reduction="sum")

    @override
    def training_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        nll = self.nll_sum(batch)
        self.nll_sums.append(nll.item())
        if batch["last_of_step"]:
            self.log("train/loss", nll.detach() / batch["num_supervised"])
        return {"loss": nll * self.trainer.accumulate_grad_batches / batch["step_supervised"], "nll_sum": nll.detach()}

    @override
    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self.log("val/loss", self.nll_sum(batch) / batch["num_supervised"], batch_size=1)

    @override
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.model.parameters(), lr=0.1)


class TinyLoader:
    """Epochs of micro-batches with samples of the given lengths.

    Args:
        accumulate: Micro-batches of an optimizer step; an epoch's last step may have fewer.
        steps_done: Tells where to begin, at every `iter`: after this many optimizer steps. Left out, after those that
            were served.
    """

    def __init__(
        self, lengths: Sequence[int], *, accumulate: int = 1, steps_done: Callable[[], int] | None = None
    ) -> None:
        self.lengths = lengths
        self.accumulate = accumulate
        self.steps_served = 0
        self.steps_done = steps_done or (lambda: self.steps_served)

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def steps(self) -> int:
        """The optimizer steps of an epoch."""
        return math.ceil(len(self.lengths) / self.accumulate)

    def __iter__(self) -> Iterator[Batch]:
        epoch, step = divmod(self.steps_done(), self.steps)
        for index in range(step * self.accumulate, len(self.lengths)):
            batch = self.batch(epoch, index)
            self.steps_served += batch["last_of_step"]
            yield batch

    def place_after(self, step: int) -> tuple[int, int, bool]:
        """Return where an optimizer step ends: the epoch, the micro-batches in it so far, whether they are all."""
        epoch, number = divmod(step, self.steps)
        batches = min((number + 1) * self.accumulate, len(self.lengths))
        return epoch, batches, batches == len(self.lengths)

    def batch(self, epoch: int, index: int) -> Batch:
        """Make one micro-batch; its first two tokens are not supervised."""
        window = index // self.accumulate
        window_lengths = self.lengths[window * self.accumulate : (window + 1) * self.accumulate]
        generator = torch.Generator().manual_seed(1000 * epoch + index)
        input_ids = torch.randint(3, VOCABULARY, (1, self.lengths[index]), generator=generator)
        labels = input_ids.clone()
        labels[:, :2] = -100
        return {
            "input_ids": input_ids,
            "labels": labels,
            "num_tokens": self.lengths[index],
            "num_supervised": self.lengths[index] - 2,
            "num_samples": 1,
            "step_supervised": sum(window_lengths) - 2 * len(window_lengths),
            "epoch": epoch,
            "step": epoch * self.steps + window,
            "first_of_step": index % self.accumulate == 0,
            "last_of_step": index % self.accumulate == self.accumulate - 1 or index == len(self.lengths) - 1,
        }

    def state_dict(self) -> dict[str, int]:
        """Tell Lightning that there is a way to go on in mid-epoch."""
        return {}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Do nothing."""


def held_out(*lengths: int) -> TinyLoader:
    """Make a loader that serves the same samples at every `iter`."""
    return TinyLoader(lengths, steps_done=lambda: 0)


class FakeClock:
    """A clock that stands still until it is told otherwise."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def make_trainer(directory: Path, callbacks: Sequence[Callback], **settings: Any) -> Trainer:
    """Make a quiet CPU trainer without logger, checkpoints and progress bar, unless the settings say otherwise."""
    defaults: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": any(type(callback).__name__ == "TuneProgressBar" for callback in callbacks),
        "enable_model_summary": False,
        "log_every_n_steps": 1,
        "num_sanity_val_steps": 0,
        "default_root_dir": directory,
    }
    return Trainer(callbacks=list(callbacks), **(defaults | settings))


def fit(
    run: Path,
    checkpoint: Checkpoint,
    *callbacks: Callback,
    before: Sequence[Callback] = (),
    stop: GracefulStop | None = None,
    module: LightningModule | None = None,
    lengths: Sequence[int] = (8, 8, 8, 8, 8),
    accumulate: int = 1,
    val_loader: TinyLoader | None = None,
    ckpt_path: Path | None = None,
    **settings: Any,
) -> Trainer:
    """Train in the directory `run`, or go on there, with the callbacks in the order that a run of `lit-tune` has.

    Args:
        before: Callbacks that go ahead of those that save and stop.
        val_loader: Serves the held-out samples; there are none without it.
        settings: The trainer's.
    """
    run.mkdir(exist_ok=True)
    logger = MetricsCsv(run, first_step=read(ckpt_path)["global_step"] if ckpt_path else 0)
    checkpoint.bind(run, flush_logs=logger.flush)
    loader = TinyLoader(lengths, accumulate=accumulate, steps_done=lambda: trainer.global_step)
    first = [checkpoint, stop or GracefulStop(checkpoint), Continuation(loader.place_after)]
    trainer = make_trainer(
        run,
        [*before, *first, *callbacks],
        **{"accumulate_grad_batches": accumulate, "plugins": [AtomicCheckpointIO()], "logger": logger} | settings,
    )
    trainer.fit(module or TinyModule(), loader, val_loader, ckpt_path=ckpt_path)
    return trainer
