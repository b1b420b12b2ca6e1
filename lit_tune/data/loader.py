"""Loaders without a state of their own: the optimizer steps done since the run's start say what comes next.

Epoch and offset are derived from that number, so nothing has to be counted on in a place that Lightning may skip, and
no batch is replayed to get there. The samples lie tokenised in a memory map; making a micro-batch takes well under a
millisecond, so no worker processes are needed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lit_tune.data.collate import collate
from lit_tune.data.encode import Encoded
from lit_tune.data.packing import Cut, MicroBatch, Step, held_out_micro_batches, num_steps, plan_epoch

Batch = dict[str, Any]


def rng_seed(*parts: int) -> int:
    """Return a seed (63 bits) that depends on all parts; neighbouring parts give unrelated seeds."""
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0] >> np.uint64(1))


def supervised_counts(data: Encoded) -> NDArray[np.int64]:
    """Return the number of labels of every sample [N]; the first token of a sample is never one."""
    before = np.concatenate([[0], np.cumsum(data.supervised, dtype=np.int64)])
    counts: NDArray[np.int64] = before[data.bounds[:, 1]] - before[data.bounds[:, 0] + 1]
    return counts


class StepSource:
    """The training data of a run as optimizer steps: what step k of the run trains on, for any k.

    Args:
        data: The tokenised samples.
        cut: How a step is divided.
        seed: Of the order of samples and of dropout.
        pad_token_id: Fills padded rows and the filler of idle ranks.
    """

    def __init__(self, data: Encoded, cut: Cut, *, seed: int, pad_token_id: int) -> None:
        self.data = data
        self.cut = cut
        self.seed = seed
        self.pad_token_id = pad_token_id
        self._planned: tuple[int, list[Step]] = (-1, [])
        self._known = (0, 0)
        self._supervised = supervised_counts(data)

    def steps_in(self, epoch: int) -> int:
        """Return the number of optimizer steps of an epoch."""
        if self._planned[0] == epoch:
            return len(self._planned[1])
        return num_steps(self.data.lengths, self.cut, seed=self.seed, epoch=epoch)

    def know(self, *, epoch: int, steps_before: int) -> None:
        """Take as known how many steps come before an epoch: with a token budget, counting them takes planning."""
        self._known = (epoch, steps_before)

    def locate(self, steps_done: int) -> tuple[int, int]:
        """Return (epoch, step within it) of the step that follows after `steps_done` steps."""
        epoch, before = self._known if self._known[1] <= steps_done else (0, 0)
        while steps_done - before >= (steps := self.steps_in(epoch)):
            before += steps
            epoch += 1
        self.know(epoch=epoch, steps_before=before)
        return epoch, steps_done - before

    def plan(self, epoch: int) -> list[Step]:
        """Return the steps of an epoch."""
        if self._planned[0] != epoch:
            self._planned = (epoch, plan_epoch(self.data.lengths, self.cut, seed=self.seed, epoch=epoch))
        return self._planned[1]

    def micro_batches(self, step: Step, *, epoch: int, number: int, rank: int) -> Iterator[Batch]:
        """Yield the micro-batches of one rank in an optimizer step; `number` counts steps from the run's start."""
        supervised = self.supervised_tokens(step)
        for k, micro in enumerate(step):
            samples = [self.data.sample(i) for i in micro[rank]]
            yield collate(samples, packing=self.cut.packing, pad_token_id=self.pad_token_id) | {
                "step_supervised": supervised,
                "epoch": epoch,
                "step": number,
                "first_of_step": k == 0,
                "last_of_step": k == len(step) - 1,
                # By the place in the step, so that as many micro-batches on other ranks drop out the same.
                "rng_seed": rng_seed(self.seed, number, k * self.cut.world + rank),
                "sample_ids": self.sample_ids(micro[rank]),
            }

    def supervised_tokens(self, step: Step) -> int:
        """Return the supervised tokens of an optimizer step, over all its micro-batches and ranks."""
        return int(sum(self._supervised[i] for micro in step for samples in micro for i in samples))

    def sample_ids(self, samples: MicroBatch) -> list[int]:
        """Return the records that samples were made of."""
        return [int(self.data.ids[i]) for i in samples]


class TrainLoader:
    """One epoch's micro-batches of one rank for each `iter`, going on after the optimizer steps that are done by then.

    With a token budget the number of micro-batches differs between epochs; `SizedTrainLoader` is for the other case.

    Args:
        steps_done: Tells the optimizer steps done since the run's start: the trainer's own count, however far ahead
            batches were fetched.
    """

    def __init__(self, source: StepSource, *, rank: int, steps_done: Callable[[], int]) -> None:
        self.source = source
        self.rank = rank
        self.steps_done = steps_done

    def __iter__(self) -> Iterator[Batch]:
        done = self.steps_done()
        epoch, first = self.source.locate(done)
        for number, step in enumerate(self.source.plan(epoch)[first:], start=done):
            yield from self.source.micro_batches(step, epoch=epoch, number=number, rank=self.rank)

    def state_dict(self) -> dict[str, int]:
        """Return nothing to save. That there is a state tells Lightning that the loader can go on in mid-epoch."""
        return {}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Do nothing: the position is the trainer's."""


class SizedTrainLoader(TrainLoader):
    """A `TrainLoader` whose epochs all have the same number of micro-batches, so that Lightning can know it."""

    def __len__(self) -> int:
        """Return the micro-batches of one rank in a whole epoch."""
        cut = self.source.cut
        assert cut.samples is not None
        samples, full = len(self.source.data), cut.samples * cut.slots
        rest = samples % full
        return samples // full * cut.accumulate + -(-rest // (cut.samples * cut.world))


class HeldOutLoader:
    """A held-out set, each sample once, over all ranks; every rank gets the same number of micro-batches."""

    def __init__(self, data: Encoded, cut: Cut, *, rank: int, pad_token_id: int) -> None:
        self.data = data
        self.cut = cut
        self.rank = rank
        self.pad_token_id = pad_token_id
        self.micro_batches = held_out_micro_batches(data.lengths, cut)

    def __len__(self) -> int:
        """Return the micro-batches of one rank."""
        return len(self.micro_batches)

    def __iter__(self) -> Iterator[Batch]:
        for micro in self.micro_batches:
            samples = [self.data.sample(i) for i in micro[self.rank]]
            yield collate(samples, packing=self.cut.packing, pad_token_id=self.pad_token_id)


class PromptLoader:
    """Batches of prompts to answer; `common` goes into each of them."""

    def __init__(self, ids: Sequence[int], prompts: Sequence[list[int]], *, size: int, common: Batch) -> None:
        self.ids = ids
        self.prompts = prompts
        self.size = size
        self.common = common

    def __len__(self) -> int:
        """Return the number of batches."""
        return math.ceil(len(self.ids) / self.size)

    def __iter__(self) -> Iterator[Batch]:
        for k in range(0, len(self.ids), self.size):
            yield self.common | {"ids": self.ids[k : k + self.size], "prompts": self.prompts[k : k + self.size]}
