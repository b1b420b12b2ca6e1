"""The shape of what a device computes at a time: what memory and compute depend on of the data."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from lit_tune.data.instruct import InstructData
from lit_tune.data.loader import StepSource

EPOCHS_LOOKED_AT = 10


@dataclass(frozen=True)
class MicroBatch:
    """The shape of a micro-batch.

    Args:
        lengths: Tokens of each sample.
        supervised: How many of all tokens have a label.
        packed: The samples lie in one row; else each in a row of its own, padded to the longest.
    """

    lengths: tuple[int, ...]
    supervised: int
    packed: bool = True

    @property
    def tokens(self) -> int:
        """Places in its rows, padding included."""
        return sum(self.lengths) if self.packed else max(self.lengths) * len(self.lengths)


def largest_micro_batches(data: InstructData) -> list[MicroBatch]:
    """Return, of the first epochs of a run, the micro-batch with the most tokens and the one with the most supervised.

    One of them takes the most memory: layers take it for every token, the logits of a large vocabulary for those that
    are supervised.
    """
    source = data.source()
    trainer = data.trainer
    epochs = trainer.max_epochs if trainer is not None else None
    first = range(min(EPOCHS_LOOKED_AT, epochs) if epochs is not None and epochs > 0 else EPOCHS_LOOKED_AT)
    shapes = {shape for epoch in first for shape in _shapes(source, epoch, packed=data.packing)}
    longest = max(shapes, key=lambda micro: (micro.tokens, micro.supervised))
    most_supervised = max(shapes, key=lambda micro: (micro.supervised, micro.tokens))
    return list({longest, most_supervised})


def _shapes(source: StepSource, epoch: int, *, packed: bool) -> Iterator[MicroBatch]:
    for step in source.plan(epoch):
        for samples in (samples for micro in step for samples in micro if samples):
            lengths = tuple(int(source.data.lengths[i]) for i in samples)
            yield MicroBatch(lengths, source.supervised_tokens([[samples]]), packed)
