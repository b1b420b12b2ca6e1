"""Attention for padding-free rows: no token sees another sample, and no dense mask is built.

transformers' own `sdpa` finds the samples of a packed row too, but builds a [1, 1, T, T] mask: correct, and slow. Here
the boundaries `cu_seq_lens_q` (int32, cumulative lengths, as flash-attention names them) select a kernel that never
computes the blocks between samples: torch's variable-length kernel on CUDA in half precision, one causal SDPA call per
sample elsewhere. Without boundaries the rows are single right-padded samples, for which causal attention alone is
right: a real token never looks at the padding behind it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

# B rows, H query heads, K key/value heads, T tokens, D head dimension
NAME = "lit_tune_packed"


def packed_attention(
    module: torch.nn.Module,  # noqa: ARG001  # the signature is transformers' AttentionInterface
    query_BHTD: Tensor,
    key_BKTD: Tensor,
    value_BKTD: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    dropout: float = 0.0,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attend causally within each sample; return ([B, T, H, D], None) as transformers expects.

    Args:
        attention_mask: Must be None: transformers makes no mask for attention functions that it does not know.
        cu_seq_lens_q: [S + 1] start of each of S samples in the single row, then the row's end; None without packing.
        max_length_q: Length of the longest sample; needed by the CUDA kernel only.
    """
    # NOTE: transformers makes no mask for attention functions that it does not know: one here is a caller's error.
    assert attention_mask is None, "packed attention masks by sample boundaries, not by attention_mask"
    if cu_seq_lens_q is None:
        out_BHTD = _causal(query_BHTD, key_BKTD, value_BKTD, scaling, dropout)
        return out_BHTD.transpose(1, 2), None
    assert query_BHTD.shape[0] == 1, "a packed micro-batch is one row"
    dtype = _compute_dtype(query_BHTD)
    if _is_cuda(query_BHTD) and dtype in (torch.float16, torch.bfloat16) and dropout == 0.0:
        assert max_length_q is not None
        query_BHTD, key_BKTD, value_BKTD = (x.to(dtype) for x in (query_BHTD, key_BKTD, value_BKTD))
        return _varlen(query_BHTD, key_BKTD, value_BKTD, cu_seq_lens_q, max_length_q, scaling), None
    out_BHTD = torch.cat(
        [
            _causal(query_BHTD[:, :, a:b], key_BKTD[:, :, a:b], value_BKTD[:, :, a:b], scaling, dropout)
            for a, b in pairwise(cu_seq_lens_q.tolist())
        ],
        dim=2,
    )
    return out_BHTD.transpose(1, 2), None


_assumed: list[str] = []  # what kernels are taken to run on, the innermost `as_on` last


@contextmanager
def as_on(device: str) -> Iterator[None]:
    """Choose the kernels of a kind of device whatever the tensors lie on: for predictions, where they are fake."""
    _assumed.append(device)
    try:
        yield
    finally:
        _assumed.pop()


def _is_cuda(tensor: Tensor) -> bool:
    return _assumed[-1] == "cuda" if _assumed else tensor.is_cuda


def _compute_dtype(tensor: Tensor) -> torch.dtype:
    """Return the dtype that attention computes in: autocast's own where it is on, which casts torch's functions alone.

    Over weights in fp32 the rotary embedding makes fp32 of queries and keys, also where all products are bf16.
    """
    device = tensor.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else tensor.dtype


def _causal(query: Tensor, key: Tensor, value: Tensor, scaling: float, dropout: float) -> Tensor:
    grouped = query.shape[1] != key.shape[1]
    return scaled_dot_product_attention(
        query, key, value, dropout_p=dropout, is_causal=True, scale=scaling, enable_gqa=grouped
    )


def _varlen(query: Tensor, key: Tensor, value: Tensor, cu: Tensor, longest: int, scaling: float) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn  # noqa: PLC0415  # CUDA only

    groups = query.shape[1] // key.shape[1]
    if groups > 1:  # the kernel's own `enable_gqa` came with torch 2.12; the floor is 2.11
        key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    query_THD, key_THD, value_THD = (x.squeeze(0).transpose(0, 1).contiguous() for x in (query, key, value))
    # window (-1, 0): everything behind, nothing ahead
    out_THD = varlen_attn(query_THD, key_THD, value_THD, cu, cu, longest, longest, scale=scaling, window_size=(-1, 0))
    assert isinstance(out_THD, Tensor)
    return out_THD.unsqueeze(0)


def register() -> str:
    """Make the function known to transformers under `NAME`, and return that name."""
    from transformers import AttentionInterface  # noqa: PLC0415

    AttentionInterface.register(NAME, packed_attention)
    return NAME
