"""Floating-point operations of training, per token: formulas with their derivation.

A multiplication and an addition count
as two, as in every published figure; only matrix products count, all else is less than 2 %.

A linear layer of `in x out` weights takes 2 in out operations a token in the forward pass, as many for the gradient of
its input, and as many for that of its weights. So with N such weights:

- full fine-tuning: 2N forward, 4N backward = 6N
- LoRA: frozen weights need no gradient of their own: 2N + 2N = 4N, and 6 for each weight of an adapter
- a layer whose forward pass is computed again in the backward pass (gradient checkpointing): 2 more for each weight of it
- attention: every token with those before it: scores and values 4 d_attention a pair of tokens in the forward pass, half
  of the pairs are masked, twice as much backward; so with c the mean length of what a token sees, 4 d c forward and 8 d c
  backward in each layer
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Matrices:
    """How many weights take part in matrix products.

    Args:
        attention: Of a layer's projections q, k, v and o.
        mlp: Of a layer's feed-forward half.
        head: Of the output head, which only supervised tokens need.
        adapters: Of all layers' adapters.
        layers: Number of layers.
        attention_width: Query heads x their dimension.
    """

    attention: int
    mlp: int
    head: int
    adapters: int
    layers: int
    attention_width: int


def training_flops(
    of: Matrices, *, frozen: bool, context: float, supervised: float = 1.0, again: float = 0.0, mlp_again: float = 0.0
) -> float:
    """Return the operations of forward and backward pass, per token.

    Args:
        of: The model's matrices.
        frozen: The base's weights do not train (LoRA).
        context: Mean number of tokens that a token attends to: about half a sample's length.
        supervised: Share of the tokens that have a label.
        again: Share of the layers that are computed twice.
        mlp_again: Share of the layers whose feed-forward half alone is computed twice.
    """
    passes = 4 if frozen else 6
    linear = of.attention + of.mlp
    attention = 4 * of.attention_width * context
    layer = passes * linear + 3 * attention
    recomputed = again * (2 * linear + attention) + mlp_again * 2 * of.mlp
    adapters = of.adapters * (6 + 2 * again)
    return of.layers * (layer + recomputed) + adapters + passes * of.head * supervised
