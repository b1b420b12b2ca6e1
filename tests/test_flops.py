"""Formulas against torch's own count of what a tiny Llama executes."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

from lit_tune.flops import Matrices, training_flops

TOKENS, HIDDEN, MLP, HEADS, KEYS, LAYERS, VOCABULARY, RANK = 128, 64, 160, 8, 4, 3, 96, 4
OF = Matrices(
    attention=2 * HIDDEN * HIDDEN + 2 * HIDDEN * HIDDEN * KEYS // HEADS,
    mlp=3 * HIDDEN * MLP,
    head=HIDDEN * VOCABULARY,
    adapters=LAYERS * RANK * (HIDDEN + HIDDEN + HIDDEN + HIDDEN * KEYS // HEADS),  # on q and v
    layers=LAYERS,
    attention_width=HIDDEN,
)


def counted(model: Any) -> int:
    """Return what torch counts in a forward and backward pass over one sample, all of it supervised."""
    ids = torch.randint(0, VOCABULARY, (1, TOKENS))
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids, labels=ids).loss.backward()
    return int(counter.get_total_flops())


def llama() -> Any:
    torch.manual_seed(0)
    config: Any = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=MLP,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KEYS,
    )
    config._attn_implementation = "eager"
    return LlamaForCausalLM(config).train()


def formula(*, frozen: bool, **settings: Any) -> float:
    of = OF if frozen else replace(OF, adapters=0)
    # Eager attention computes the masked half too: as if every token saw all of them.
    return TOKENS * training_flops(of, context=TOKENS, frozen=frozen, **settings)


def test_full_fine_tuning() -> None:
    assert formula(frozen=False) == counted(llama())


def test_lora() -> None:
    model = get_peft_model(llama(), LoraConfig(r=RANK, target_modules=["q_proj", "v_proj"]))
    # The first layer's input needs no gradient, which the formula leaves out of account.
    assert formula(frozen=True) == pytest.approx(counted(model), rel=0.05)


def test_layers_that_are_computed_again() -> None:
    model = llama()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    assert formula(frozen=False, again=1.0) == pytest.approx(counted(model), rel=0.01)


def test_published_figures_of_llama_2_7b() -> None:
    """6N for full fine-tuning and 4N for LoRA with the 6.607e9 weights that take part in products (no context)."""
    of = Matrices(
        attention=4 * 4096**2, mlp=3 * 4096 * 11008, head=4096 * 32000, adapters=0, layers=32, attention_width=4096
    )
    assert training_flops(of, frozen=False, context=0) == pytest.approx(6 * 6.607e9, rel=1e-3)
    assert training_flops(of, frozen=True, context=0) == pytest.approx(4 * 6.607e9, rel=1e-3)


def test_a_share_of_the_layers_costs_a_share_of_the_whole() -> None:
    none, half, full = (training_flops(OF, frozen=True, context=50, again=share) for share in (0.0, 0.5, 1.0))
    assert half - none == pytest.approx((full - none) / 2)
    mlp = training_flops(OF, frozen=True, context=50, mlp_again=1.0)
    assert mlp - none == LAYERS * 2 * OF.mlp * 2 / 3


def test_only_supervised_tokens_need_the_head() -> None:
    some, all_of_them = (training_flops(OF, frozen=False, context=0, supervised=share) for share in (0.25, 1.0))
    assert all_of_them - some == 0.75 * 6 * OF.head
