"""Gradient checkpointing: keep the input of a block, compute the block again in the backward pass.

A block's inner activations are dropped in the forward pass; its second forward pass draws the same dropout and gives
the same gradients to the bit. Chen et al., "Training Deep Nets with Sublinear Memory Cost", arXiv:1604.06174.

One mechanism for all choices, wrapped around the `forward` of the chosen blocks: transformers' own switch knows whole
layers, all of them. The wrapper lies inside a module's hooks, as FSDP2 wants it, changes no name of a weight, and does
nothing in evaluation, so that validation and generation with a KV cache run as ever.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

GradientCheckpointing = Literal["none", "full", "mlp", "auto"] | int


def checkpointed_blocks(decoder: nn.Module, setting: GradientCheckpointing) -> list[nn.Module]:
    """Return the blocks of a LLaMA-like decoder that a setting computes twice.

    Args:
        decoder: Has `layers`, each of which has an `mlp`.
        setting: `full` for every layer, a number N for every N-th from the first on, `mlp` for the feed-forward halves;
            `auto` is for the caller to resolve, here it is `none`.
    """
    layers: list[Any] = list(decoder.layers)  # type: ignore[arg-type]  # a ModuleList
    if setting in ("none", "auto"):
        return []
    if setting == "mlp":
        return [layer.mlp for layer in layers]
    return layers if setting == "full" else layers[:: int(setting)]


def checkpoint_blocks(blocks: list[nn.Module]) -> None:
    """Have the blocks keep nothing but their inputs when they train."""
    for block in blocks:
        block.forward = partial(_forward, block, block.forward)


def _forward(block: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    if not (block.training and torch.is_grad_enabled()):
        return forward(*args, **kwargs)
    # NOTE: not reentrant: a block whose inputs need no gradient, over a frozen embedding, still gives its adapters one.
    return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=True, **kwargs)
