"""From samples to the tensors of a micro-batch: the only place where data and module meet.

A batch is a dict:

=================  ==================  ===============================================================================
key                type                meaning
=================  ==================  ===============================================================================
input_ids          int64 [B, T]        token ids; B is 1 when packed
labels             int64 [B, T]        the token ids again, -100 where not supervised; unshifted, as in transformers;
                                       the first of every sample is never supervised
positions          int64 [S]           where a supervised token is predicted (the place before it), through all rows
targets            int64 [S]           the ids of those tokens
position_ids       int64 [B, T]        positions, starting at 0 in every sample
cu_seqlens         int32 [S + 1]       packed only: start of each of S samples in the row, then the row's end
longest            int                 packed only: length of the longest sample
num_tokens         int                 tokens of this rank's micro-batch without padding
num_supervised     int                 of these, those with a label
num_samples        int                 samples; 0 in the filler that an idle rank gets at an epoch's end
step_supervised    int                 training only: supervised tokens of the whole optimizer step, all ranks
epoch, step        int                 training only: epoch, and optimizer step counted from the run's start
first_of_step      bool                training only: an optimizer step begins with this micro-batch
last_of_step       bool                training only: the optimizer steps after this micro-batch
rng_seed           int                 training only: seeds dropout; a function of (seed, step, place in the step)
sample_ids         list[int]           training only: the records that the samples were made of, by place in the file
=================  ==================  ===============================================================================
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from lit_tune.data.encode import IGNORED

# A sample: token ids [T] and labels [T]
Sample = tuple[NDArray[Any], NDArray[Any]]


def collate(samples: Sequence[Sample], *, packing: bool, pad_token_id: int) -> dict[str, Any]:
    """Make the tensors of one micro-batch; no samples give a filler that costs one token and trains nothing."""
    rows = samples or [(np.array([pad_token_id]), np.array([IGNORED]))]
    batch = _pack(rows) if packing else _pad(rows, pad_token_id)
    labels = batch["labels"].flatten()  # a row's first label is never supervised
    supervised = (labels != IGNORED).nonzero().squeeze(1)
    return batch | {
        "positions": supervised - 1,
        "targets": labels[supervised],
        "num_tokens": sum(len(ids) for ids, _ in samples),
        "num_supervised": len(supervised),
        "num_samples": len(samples),
    }


def _pack(samples: Sequence[Sample]) -> dict[str, Any]:
    lengths = [len(ids) for ids, _ in samples]
    return {
        "input_ids": _row([ids for ids, _ in samples]),
        "labels": _row([labels for _, labels in samples]),
        "position_ids": _row([np.arange(length) for length in lengths]),
        "cu_seqlens": torch.tensor(np.cumsum([0, *lengths]), dtype=torch.int32),
        "longest": max(lengths),
    }


def _row(parts: Sequence[NDArray[Any]]) -> torch.Tensor:
    return torch.from_numpy(np.concatenate(parts).astype(np.int64)).unsqueeze(0)


def _pad(samples: Sequence[Sample], pad_token_id: int) -> dict[str, Any]:
    """Pad on the right: causal attention then needs no mask, for no real token looks at what lies behind it."""
    longest = max(len(ids) for ids, _ in samples)
    input_ids = np.full((len(samples), longest), pad_token_id, dtype=np.int64)
    labels = np.full((len(samples), longest), IGNORED, dtype=np.int64)
    for row, (ids, row_labels) in enumerate(samples):
        input_ids[row, : len(ids)] = ids
        labels[row, : len(ids)] = row_labels
    return {
        "input_ids": torch.from_numpy(input_ids),
        "labels": torch.from_numpy(labels),
        "position_ids": torch.arange(longest).expand(len(samples), longest).contiguous(),
    }
