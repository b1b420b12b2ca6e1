"""Quantised bases on a CPU, against the same model with plain weights of the values that the codes stand for."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn.modules import Linear4bit, Linear8bitLt
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from lit_tune.modules import checkpointing, load
from lit_tune.modules.load import Quantize
from lit_tune.modules.lora import Lora, apply_lora
from tests.tiny_llama import tiny_llama

IDS = torch.randint(0, 300, (2, 40), generator=torch.Generator().manual_seed(0))
ALL: list[Quantize] = ["int8", "nf4", "fp4"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A base whose layers have whole blocks of 64 numbers."""
    directory = tmp_path_factory.mktemp("base")
    tiny_llama(width=64).save_pretrained(directory)
    return str(directory)


def adapted(base: str, quantize: Quantize, dtype: torch.dtype = torch.float32, variant: Any = "lora") -> Any:
    bare = load.load_llama(base, dtype=dtype, quantize=quantize, attention_name="sdpa")
    lora = Lora(rank=4, dropout=0.0, targets="all-linear", variant=variant)
    torch.manual_seed(1)
    model: Any = apply_lora(bare, lora)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.05)
    return model.train()


def quantized(model: nn.Module) -> Iterator[tuple[str, Any]]:
    # By class, not by name: PEFT's own layers around these are called the same.
    yield from ((name, layer) for name, layer in model.named_modules() if isinstance(layer, Linear8bitLt | Linear4bit))


def plain_weight(layer: Any) -> Tensor:
    weight = layer.weight
    if hasattr(weight, "quant_state"):
        plain: Tensor = dequantize_4bit(weight.data, weight.quant_state)
        return plain
    # bitsandbytes' absmax quantisation by rows: 127 stands for a row's largest number.
    rows: Tensor = weight.CB.float() * weight.SCB[:, None] / 127
    return rows


@pytest.mark.parametrize("quantize", ALL)
def test_loss_and_gradients_are_those_of_the_dequantised_weights(base: str, quantize: Quantize) -> None:
    model, reference = adapted(base, quantize), adapted(base, "none")
    weights = {name: plain_weight(layer) for name, layer in quantized(model)}
    assert len(weights) == 2 * 7  # every linear layer but the head
    for name, weight in weights.items():
        original = reference.get_submodule(name).weight
        assert not torch.equal(weight, original)
        # 8 bits are right to a 254th of a row's largest, 4 bits to some tenth of a block's.
        assert (weight - original).norm() < (0.02 if quantize == "int8" else 0.2) * original.norm()
        original.data.copy_(weight)
    losses = [each(input_ids=IDS, labels=IDS).loss for each in (model, reference)]
    for loss in losses:
        loss.backward()
    # fp32 sums of products in another order.
    assert float(losses[0].detach()) == pytest.approx(float(losses[1].detach()), rel=1e-5)
    expected = dict(reference.named_parameters())
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert torch.dist(parameter.grad, expected[name].grad) <= 1e-4 * expected[name].grad.norm(), name


@pytest.mark.parametrize("quantize", ALL)
@pytest.mark.parametrize("setting", ["none", "full", "mlp"])
def test_frozen_layers_keep_no_inputs(base: str, quantize: Quantize, setting: Any) -> None:
    """The reference: the same layers with plain weights, of which autograd keeps no input that it does not need."""
    model = adapted(base, quantize)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("layers.0.self_attn.q_proj.lora" in name)  # the rest of it only hands gradients down
    checkpointing.checkpoint_blocks(checkpointing.checkpointed_blocks(model.get_base_model().model, setting))
    inputs: list[StorageWeakRef] = []
    for name, layer in quantized(model):
        if "down_proj" in name:  # of whose input nothing else needs the values
            layer.register_forward_pre_hook(
                lambda _layer, given: inputs.append(StorageWeakRef(given[0].untyped_storage()))
            )
    loss = model(input_ids=IDS, labels=IDS).loss
    assert len(inputs) == 2
    assert all(storage.expired() for storage in inputs)
    loss.backward()


def test_dora_over_int8_fails_on_a_cpu(base: str) -> None:
    """What the table of techniques refuses, to be told by the versions in which it works."""
    model = adapted(base, "int8", variant="dora")
    model(input_ids=IDS)
    with pytest.raises(AttributeError, match="NoneType"):
        model(input_ids=IDS)


@pytest.mark.parametrize("quantize", ALL)
def test_checkpointing_changes_no_bit(base: str, quantize: Quantize) -> None:
    plain, other = adapted(base, quantize), adapted(base, quantize)
    checkpointing.checkpoint_blocks(checkpointing.checkpointed_blocks(other.get_base_model().model, "full"))
    losses = [model(input_ids=IDS, labels=IDS).loss for model in (plain, other)]
    assert torch.equal(*losses)
    for loss in losses:
        loss.backward()
    for one, another in zip(plain.parameters(), other.parameters(), strict=True):
        assert not one.requires_grad or torch.equal(one.grad, another.grad)


@pytest.mark.parametrize(
    ("quantize", "variant"),
    [("int8", "rslora"), ("nf4", "rslora"), ("fp4", "rslora"), ("nf4", "dora"), ("fp4", "dora")],
)
def test_variants_train_over_every_base(base: str, quantize: Quantize, variant: str) -> None:
    model = adapted(base, quantize, variant=variant)
    for _ in range(2):
        model(input_ids=IDS, labels=IDS).loss.backward()
    for name, parameter in model.named_parameters():
        assert not parameter.requires_grad or parameter.grad.any(), name
