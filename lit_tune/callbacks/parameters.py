"""How many parameters the model has and how many of them train: printed and logged when training starts."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_only
from typing_extensions import override

from lit_tune.callbacks.summary import parameters_text


class ParameterCount(Callback):
    """Print and log the numbers of parameters; the module tells them by `parameter_counts()`."""

    def __init__(self) -> None:
        self.total = 0
        self.trainable = 0

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        module: Any = pl_module
        self.total, self.trainable = module.parameter_counts()
        _print(f"Parameters: {parameters_text(self.trainable, self.total)}")

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.global_step:
            return
        figures = {
            "parameters/total": self.total,
            "parameters/trainable": self.trainable,
            "parameters/trainable_percent": 100 * self.trainable / self.total,
        }
        for logger in trainer.loggers:
            logger.log_metrics(figures, step=0)


@rank_zero_only
def _print(text: str) -> None:
    print(text, flush=True)
