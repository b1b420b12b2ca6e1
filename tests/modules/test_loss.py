"""The loss against transformers' own, which makes all logits at once."""

import pytest
import torch
from torch.nn.functional import cross_entropy

from lit_tune.modules import loss
from lit_tune.modules.loss import nll_sum
from tests.tiny_llama import VOCABULARY, tiny_llama


def supervised(labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return where the supervised tokens are predicted, and their ids."""
    rows, places = (labels[:, 1:] != -100).nonzero(as_tuple=True)
    return rows * labels.shape[1] + places, labels[rows, places + 1]


def test_equals_cross_entropy_over_all_logits() -> None:
    model = tiny_llama()
    input_ids = torch.randint(0, VOCABULARY, (2, 20))
    labels = input_ids.masked_fill(torch.rand(2, 20) < 0.5, -100)
    reference = model(input_ids=input_ids, labels=labels).loss  # a mean over the supervised tokens
    count = (labels[:, 1:] != -100).sum()
    hidden = model.model(input_ids=input_ids).last_hidden_state
    ours = nll_sum(hidden, *supervised(labels), model.lm_head, vocabulary=VOCABULARY)
    torch.testing.assert_close(ours / count, reference, rtol=1e-6, atol=0)


def test_chunks_change_neither_loss_nor_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    head = torch.nn.Linear(8, 50, bias=False)
    hidden = torch.randn(2, 30, 8, requires_grad=True)
    labels = torch.randint(0, 50, (2, 30))
    results = []
    for rows in (1000, 7):
        monkeypatch.setattr(loss, "MAX_LOGITS_BYTES", rows * 4 * 50)
        total = nll_sum(hidden, *supervised(labels), head, vocabulary=50)
        results.append((total.detach(), *torch.autograd.grad(total, [hidden, head.weight])))
    for whole, chunked in zip(*results, strict=True):
        torch.testing.assert_close(chunked, whole, rtol=1e-5, atol=1e-5)


def test_prompt_rows_get_no_logits() -> None:
    seen = []

    def head(hidden: torch.Tensor) -> torch.Tensor:
        seen.append(len(hidden))
        return hidden @ torch.ones(8, 50)

    labels = torch.full((1, 10), -100)
    labels[0, 7:] = 3
    nll_sum(torch.randn(1, 10, 8), *supervised(labels), head, vocabulary=50)
    assert seen == [3]


def test_filler_gives_zero_with_gradients() -> None:
    head = torch.nn.Linear(8, 50)
    total = nll_sum(torch.randn(1, 1, 8), *supervised(torch.tensor([[-100]])), head, vocabulary=50)
    total.backward()
    assert total.item() == 0.0
    assert head.weight.grad is not None
    assert not head.weight.grad.any()


def test_half_precision_logits_are_summed_in_fp32() -> None:
    torch.manual_seed(0)
    head = torch.nn.Linear(8, 50, bias=False).bfloat16()
    hidden, labels = torch.randn(1, 400, 8).bfloat16(), torch.randint(0, 50, (1, 400))
    reference = cross_entropy(head(hidden[0, :-1]).float(), labels[0, 1:], reduction="sum")
    assert nll_sum(hidden, *supervised(labels), head, vocabulary=50).dtype == torch.float32
    torch.testing.assert_close(nll_sum(hidden, *supervised(labels), head, vocabulary=50), reference)
