"""Floating-point operations of training, per token: formulas with their derivation.

A multiplication and an addition count as two, as in every published figure; only matrix products count, all else is
less than 2 %. A linear layer of `in x out` weights takes 2 in out operations a token in the forward pass, as many for
the gradient of its input, and as many for that of its weights. So with N such weights:

- full fine-tuning: 2N forward, 4N backward = 6N
- LoRA: frozen weights need no gradient of their own: 2N + 2N = 4N, and 6 for each weight of an adapter
- a layer whose forward pass is computed again in the backward pass (gradient checkpointing): 2 more for each weight,
  but not for those of its last product, a third of its feed-forward half: the backward pass needs nothing of it
- attention, where a token sees c others on average (half a sample's length): scores 2 d c and values 2 d c in each
  layer's forward pass, with d the width of all query heads, and twice as much in the backward pass
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
    inner_mlp = of.mlp * 2 / 3  # gate and up
    recomputed = again * (2 * (of.attention + inner_mlp) + attention) + mlp_again * 2 * inner_mlp
    adapters = of.adapters * (6 + 2 * again)
    return of.layers * (layer + recomputed) + adapters + passes * of.head * supervised
