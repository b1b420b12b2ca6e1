"""Lightning's counters, set so that a run goes on exactly where its checkpoint was saved.

Lightning restores the counters as they were in the middle of whatever hook saved them, and guesses from them what was
done: after an epoch's last batch it skips the validation and the epoch's end, after two continuations it loses the
loader's place, and a run cut into other micro-batches counts wrong. All of it follows from one number, the optimizer
steps done; so the counters are made anew from that, in the one form that Lightning continues without guessing: an
epoch under way, with whole steps behind it, perhaps none.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from typing_extensions import override

Counts = dict[str, int]


def progress(*, ready: int, processed: int, total: int | None = None) -> dict[str, Any]:
    """Return the state of one of Lightning's trackers: what is begun and done, and in the whole run if that differs."""

    def counts(begun: int, done: int) -> Counts:
        return {"ready": begun, "started": begun, "processed": done, "completed": done}

    current = counts(ready, processed)
    return {"current": current, "total": current if total is None else counts(total, total)}


def restarted(
    fit_loop: dict[str, Any], *, steps: int, epoch: int, batches: int, ends_epoch: bool, validate: bool
) -> dict[str, Any]:
    """Return the state of Lightning's fit loop from which it goes on after an optimizer step.

    Args:
        fit_loop: The saved state; what is not about the place stays.
        steps: Optimizer steps since the run's start.
        epoch: The epoch that the last of them was in.
        batches: Micro-batches of a rank in that epoch.
        ends_epoch: They are all that the epoch has.
        validate: The validation that was due after the last step is yet to be done.
    """
    counted = fit_loop["epoch_loop.batch_progress"]
    all_batches = counted["total"]["completed"]
    if counted["current"]["completed"]:  # it may have been another number in this epoch, in another cut
        all_batches += batches - counted["current"]["completed"]
    if ends_epoch and not validate:
        epoch, batches, ends_epoch = epoch + 1, 0, False
    # NOTE: loggers number the next row by this. While the validation is due, the step before is not over.
    numbered = {"_batches_that_stepped": steps - validate}
    # One batch begun and none done is how Lightning knows a validation to be repeated.
    return fit_loop | {
        "epoch_progress": progress(ready=epoch + 1, processed=epoch),
        "epoch_loop.state_dict": fit_loop["epoch_loop.state_dict"] | numbered,
        "epoch_loop.batch_progress": progress(ready=batches, processed=batches, total=all_batches)
        | {"is_last_batch": ends_epoch},
        "epoch_loop.val_loop.batch_progress": progress(ready=int(validate), processed=0) | {"is_last_batch": False},
    }


class Continuation(Callback):
    """Continue a run where its checkpoint was saved, on as many devices as there are now.

    Args:
        place_after: Maps an optimizer step to where it ends as the run is cut now: the epoch, a rank's micro-batches in
            it, and whether these are all.
    """

    def __init__(self, place_after: Callable[[int], tuple[int, int, bool]]) -> None:
        self.place_after = place_after
        self._continued = False

    @override
    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if trainer.state.fn != TrainerFn.FITTING:
            return
        steps = int(checkpoint["global_step"])
        epoch, batches, ends_epoch = self.place_after(steps - 1) if steps else (0, 0, False)
        checkpoint["loops"]["fit_loop"] = restarted(
            checkpoint["loops"]["fit_loop"],
            steps=steps,
            epoch=epoch,
            batches=batches,
            ends_epoch=ends_epoch,
            validate=checkpoint["validation_due"],
        )
        self._continued = True

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self._continued:
            # NOTE: where a validation could have been due, Lightning has counted a step once more on its way here.
            trainer.fit_loop.epoch_loop._batches_that_stepped = trainer.global_step
            self._continued = False
