"""The loss: token cross-entropies summed over supervised positions, their logits computed in chunks.

Only supervised positions get logits: the prompt's rows, often half of all, cost nothing. The logits of a chunk are
made, used and dropped, and made again in the backward pass, so that their memory is bounded (`MAX_LOGITS_BYTES`)
whatever the vocabulary and the batch; a micro-batch that fits in one chunk pays no recomputation.

The sum is divided later, once, by the supervised tokens of the whole optimizer step: a mean of micro-batch means would
weigh a token by the length of its neighbours.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

# B rows, T tokens, D hidden size, S supervised positions, V vocabulary
MAX_LOGITS_BYTES = 256 * 1024**2


def nll_sum(
    hidden_BTD: Tensor, positions_S: Tensor, targets_S: Tensor, head: Callable[[Tensor], Tensor], *, vocabulary: int
) -> Tensor:
    """Return the sum of the cross-entropies (nats, fp32 scalar) of all supervised tokens.

    Args:
        hidden_BTD: Last hidden states.
        positions_S: Where a supervised token is predicted (the place before its own), counted through all rows. Given
            rather than found here: to find them would have the host wait for the device.
        targets_S: The ids of those tokens.
        head: Maps [n, D] hidden states to [n, V] logits.
        vocabulary: V; sets how many positions make a chunk.
    """
    hidden_SD = hidden_BTD.flatten(0, 1).index_select(0, positions_S)
    rows = max(1, MAX_LOGITS_BYTES // (4 * vocabulary))  # fp32 logits: 4 bytes each
    if len(targets_S) <= rows:
        return _chunk_nll(hidden_SD, targets_S, head)
    parts = [
        checkpoint(_chunk_nll, hidden, targets, head, use_reentrant=False)
        for hidden, targets in zip(hidden_SD.split(rows), targets_S.split(rows), strict=True)
    ]
    return torch.stack(parts).sum()


def _chunk_nll(hidden_SD: Tensor, targets_S: Tensor, head: Callable[[Tensor], Tensor]) -> Tensor:
    return cross_entropy(head(hidden_SD).float(), targets_S, reduction="sum")
