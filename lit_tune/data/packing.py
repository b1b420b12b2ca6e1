"""Which samples make an optimizer step, and how a step is cut into micro-batches: pure functions of numbers.

The samples of a step are fixed first, by (seed, epoch, global batch); only then is the step cut into ranks and
micro-batches. So any cut of the same global batch into devices x accumulation x micro-batch sees the same samples in
the same steps. Cutting balances tokens: ranks wait for the longest, so every micro-batch gets about the same length.
"""

from __future__ import annotations

import heapq
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

MicroBatch = list[int]  # sample indices; empty for a rank that has nothing left to do
Step = list[list[MicroBatch]]  # [micro-batch][rank]


@dataclass(frozen=True)
class Cut:
    """How an optimizer step is divided.

    Args:
        world: Number of ranks.
        accumulate: Micro-batches per rank and full step.
        samples: Samples in a micro-batch; or None where `tokens` bounds it.
        tokens: Tokens in a micro-batch, padding included; or None where `samples` bounds it.
        packing: Rows without padding; else each row is one sample, padded to the longest of its micro-batch.
    """

    world: int
    accumulate: int
    samples: int | None
    tokens: int | None
    packing: bool

    @property
    def slots(self) -> int:
        """Micro-batches of a full step over all ranks."""
        return self.world * self.accumulate


def epoch_order(num_samples: int, *, seed: int, epoch: int) -> NDArray[np.int64]:
    """Return the order [num_samples] in which an epoch serves the samples: a function of (seed, epoch) alone."""
    return np.random.default_rng([seed, epoch]).permutation(num_samples)


def plan_epoch(lengths: NDArray[np.int64], cut: Cut, *, seed: int, epoch: int) -> list[Step]:
    """Return the steps of an epoch. Every step but the last has exactly `cut.accumulate` micro-batches per rank."""
    order = epoch_order(len(lengths), seed=seed, epoch=epoch).tolist()
    if cut.samples is not None:
        size = cut.samples * cut.slots
        groups = [order[i : i + size] for i in range(0, len(order), size)]
        return [_to_step(_divide(group, lengths, cut), cut) for group in groups]
    return [_to_step(bins, cut) for bins in _fill(order, lengths, cut)]


def num_steps(lengths: NDArray[np.int64], cut: Cut, *, seed: int, epoch: int) -> int:
    """Return the number of optimizer steps of an epoch."""
    if cut.samples is not None:
        return -(-len(lengths) // (cut.samples * cut.slots))
    return len(plan_epoch(lengths, cut, seed=seed, epoch=epoch))


def held_out_micro_batches(lengths: NDArray[np.int64], cut: Cut) -> list[list[MicroBatch]]:
    """Cut a held-out set into [micro-batch][rank], each sample exactly once; longest first: memory shows at once."""
    samples = np.argsort(-lengths, kind="stable").tolist()
    if cut.samples is not None:
        bins = [samples[i : i + cut.samples] for i in range(0, len(samples), cut.samples)]
    else:
        one_slot = Cut(world=1, accumulate=1, samples=None, tokens=cut.tokens, packing=cut.packing)
        bins = [micro for step in _fill(samples, lengths, one_slot) for micro in step]
    return _to_step(bins, cut)


def _divide(samples: Sequence[int], lengths: NDArray[np.int64], cut: Cut) -> list[MicroBatch]:
    """Divide a step's samples into micro-batches of at most `cut.samples`, no more of them than are needed."""
    assert cut.samples is not None
    longest_first = sorted(samples, key=lambda i: (-int(lengths[i]), i))
    if not cut.packing:  # neighbours in length pad each other least
        return [longest_first[i : i + cut.samples] for i in range(0, len(samples), cut.samples)]
    count = -(-len(samples) // (cut.samples * cut.world)) * cut.world
    # Longest processing time first: the next longest sample goes to the emptiest micro-batch that has room.
    heap: list[tuple[int, int]] = [(0, slot) for slot in range(count)]
    bins: list[MicroBatch] = [[] for _ in range(count)]
    for sample in longest_first:
        tokens, slot = heapq.heappop(heap)
        bins[slot].append(sample)
        if len(bins[slot]) < cut.samples:
            heapq.heappush(heap, (tokens + int(lengths[sample]), slot))
    return bins


def _fill(order: Sequence[int], lengths: NDArray[np.int64], cut: Cut) -> list[list[MicroBatch]]:
    """Fill steps of `cut.slots` micro-batches, samples taken in the given order; only the last may have fewer."""
    assert cut.tokens is not None
    assert all(lengths[order] <= cut.tokens), "the data module refuses samples longer than a micro-batch"
    return (_fill_rows if cut.packing else _fill_padded)(order, lengths, tokens=cut.tokens, slots=cut.slots)


def _fill_rows(order: Sequence[int], lengths: NDArray[np.int64], *, tokens: int, slots: int) -> list[list[MicroBatch]]:
    """Fill rows without padding, first fit; a sample that fits into none of a full step opens the next."""
    steps: list[list[MicroBatch]] = []
    bins: list[MicroBatch] = []
    room: list[int] = []
    for sample in order:
        length = int(lengths[sample])
        slot = next((slot for slot, left in enumerate(room) if length <= left), None)
        if slot is None:
            if not bins or len(bins) == slots:
                bins, room = [], []
                steps.append(bins)
            slot = len(bins)
            bins.append([])
            room.append(tokens)
        bins[slot].append(sample)
        room[slot] -= length
    return steps


def _fill_padded(
    order: Sequence[int], lengths: NDArray[np.int64], *, tokens: int, slots: int
) -> list[list[MicroBatch]]:
    """Give each step as many samples as its padded micro-batches hold when neighbours in length are together."""
    steps: list[list[MicroBatch]] = []
    before = np.concatenate([[0], np.cumsum(lengths[order])])
    start = 0
    while start < len(order):
        # Without any padding no more than this many would fit; grouped, fewer do. More samples never need fewer
        # micro-batches: what holds a sample still holds the rest without it.
        most = int(np.searchsorted(before, before[start] + slots * tokens, side="right")) - 1
        ends = range(start + 1, most + 1)
        end = start + bisect_right(ends, slots, key=lambda end: len(_grouped(order[start:end], lengths, tokens)))
        bins = _grouped(order[start:end], lengths, tokens)
        while len(bins) < slots and end < len(order):  # a step that is not the last has all its micro-batches
            fullest = max(range(len(bins)), key=lambda slot: len(bins[slot]))
            half = len(bins[fullest]) // 2
            bins[fullest : fullest + 1] = [bins[fullest][:half], bins[fullest][half:]]
        steps.append(bins)
        start = end
    return steps


def _grouped(samples: Sequence[int], lengths: NDArray[np.int64], tokens: int) -> list[MicroBatch]:
    """Cut samples, longest first, into the fewest micro-batches of at most `tokens`, padding included."""
    bins: list[MicroBatch] = []
    for sample in sorted(samples, key=lambda i: (-int(lengths[i]), i)):
        if not bins or (len(bins[-1]) + 1) * int(lengths[bins[-1][0]]) > tokens:
            bins.append([])
        bins[-1].append(sample)
    return bins


def _to_step(bins: Sequence[MicroBatch], cut: Cut) -> Step:
    """Deal micro-batches to the ranks; where they do not come out even, the last ones are empty."""
    full = [*bins, *([] for _ in range(-len(bins) % cut.world))]
    return [list(full[i : i + cut.world]) for i in range(0, len(full), cut.world)]
