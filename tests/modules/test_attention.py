"""Packed rows against single samples through transformers' eager attention."""

from typing import Any

import pytest
import torch

from lit_tune.modules import attention
from tests.tiny_llama import VOCABULARY, tiny_llama

LENGTHS = (5, 1, 12, 30)


def packed_inputs() -> tuple[list[torch.Tensor], dict[str, torch.Tensor]]:
    torch.manual_seed(1)
    samples = [torch.randint(0, VOCABULARY, (1, length)) for length in LENGTHS]
    cu = torch.tensor([0, *LENGTHS]).cumsum(0).int()
    row = {
        "input_ids": torch.cat(samples, dim=1),
        "position_ids": torch.cat([torch.arange(length) for length in LENGTHS]).unsqueeze(0),
        "cu_seq_lens_q": cu,
    }
    return samples, row


def test_packed_logits_equal_single_samples() -> None:
    samples, row = packed_inputs()
    model = tiny_llama()
    model.set_attn_implementation("eager")
    alone = torch.cat([model(input_ids=ids).logits for ids in samples], dim=1)
    model.set_attn_implementation(attention.register())
    # fp32 sums in another order: 1e-5 of logits of order 1
    torch.testing.assert_close(model(**row).logits, alone, rtol=1e-5, atol=1e-5)


def test_right_padding_needs_no_mask() -> None:
    torch.manual_seed(1)
    ids = torch.randint(0, VOCABULARY, (1, 9))
    padded = torch.cat([ids, torch.zeros(1, 6, dtype=torch.long)], dim=1)
    model = tiny_llama()
    alone = model(input_ids=ids).logits
    model.set_attn_implementation(attention.register())
    torch.testing.assert_close(model(input_ids=padded).logits[:, :9], alone, rtol=1e-5, atol=1e-5)


def test_changing_one_sample_leaves_the_others() -> None:
    _, row = packed_inputs()
    model = tiny_llama()
    model.set_attn_implementation(attention.register())
    before = model(**row).logits
    row["input_ids"][0, : LENGTHS[0]] = 7
    after = model(**row).logits
    assert not torch.equal(before[:, : LENGTHS[0]], after[:, : LENGTHS[0]])
    assert torch.equal(before[:, LENGTHS[0] :], after[:, LENGTHS[0] :])


@pytest.mark.gpu
def test_varlen_kernel_equals_per_sample_calls() -> None:
    torch.manual_seed(2)
    cu = torch.tensor([0, *LENGTHS]).cumsum(0).int().cuda()
    total = sum(LENGTHS)
    query, key, value = (torch.randn(1, heads, total, 64, device="cuda").bfloat16() for heads in (4, 2, 2))
    module = torch.nn.Module()
    settings: dict[str, Any] = {"scaling": 0.125, "cu_seq_lens_q": cu, "max_length_q": max(LENGTHS)}
    fast, _ = attention.packed_attention(module, query, key, value, None, **settings)
    exact, _ = attention.packed_attention(module, query.float(), key.float(), value.float(), None, **settings)
    torch.testing.assert_close(fast.float(), exact, rtol=2e-2, atol=2e-2)  # bf16 has 8 bits
