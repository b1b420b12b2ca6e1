"""Adapters: how many parameters, in which dtype, beside which layers."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from lit_tune.errors import InputError
from lit_tune.modules.load import load_config
from lit_tune.modules.lora import Lora, apply_lora, count_parameters, load_adapter
from tests.tiny_llama import tiny_llama


def on_meta(base: str) -> torch.nn.Module:
    with torch.device("meta"):
        model: torch.nn.Module = AutoModelForCausalLM.from_config(load_config(base))
        return model


def test_llama2_7b_reference_run_trains_8388608_parameters() -> None:
    model = apply_lora(on_meta("llama2-7b"), Lora(rank=16, alpha=32, dropout=0.05, targets=["q_proj", "v_proj"]))  # type: ignore[arg-type]
    assert count_parameters(model) == (6_738_415_616 + 8_388_608, 8_388_608)


@pytest.mark.parametrize(
    ("base", "parameters"),
    [("llama2-13b", 13_015_864_320), ("llama2-70b", 68_976_648_192), ("llama3-8b", 8_030_261_248),
     ("llama3-70b", 70_553_706_496), ("smollm2-135m", 134_515_008)],
)  # fmt: skip
def test_shipped_shapes_have_the_published_sizes(base: str, parameters: int) -> None:
    assert count_parameters(on_meta(base)) == (parameters, parameters)


@pytest.mark.parametrize("variant", ["lora", "rslora", "dora", "pissa"])
def test_every_variant_trains_its_adapters_only(variant: str) -> None:
    model = apply_lora(tiny_llama(), Lora(rank=4, targets="all-linear", variant=variant))  # type: ignore[arg-type]
    trains = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trains
    assert all("lora_" in name for name in trains)
    wrapped = {part for name in trains for part in name.split(".") if part.endswith("_proj")}
    assert wrapped == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def test_adapters_are_fp32_over_a_half_precision_base() -> None:
    model = apply_lora(tiny_llama().bfloat16(), Lora(rank=2))
    dtypes = {("lora_" in name, parameter.dtype) for name, parameter in model.named_parameters()}
    assert dtypes == {(True, torch.float32), (False, torch.bfloat16)}


def test_unknown_target_is_refused_with_the_valid_ones() -> None:
    with pytest.raises(InputError, match=r"'q_prj'.*down_proj.*q_proj.*all-linear"):
        apply_lora(tiny_llama(), Lora(targets=["q_prj"]))


@pytest.mark.parametrize("settings", [{"rank": 0}, {"dropout": 1.0}, {"targets": []}])
def test_impossible_settings_are_refused(settings: dict[str, object]) -> None:
    with pytest.raises(InputError, match=r"model\.lora\."):
        Lora(**settings)  # type: ignore[arg-type]


def test_loaded_adapter_trains_and_is_the_saved_one(tmp_path: Path) -> None:
    saved = apply_lora(tiny_llama(), Lora(rank=2))
    with torch.no_grad():
        for name, parameter in saved.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    saved.save_pretrained(str(tmp_path))
    loaded = load_adapter(tiny_llama(), str(tmp_path))
    for (name, a), (_, b) in zip(saved.named_parameters(), loaded.named_parameters(), strict=True):
        assert torch.equal(a, b), name
        assert a.requires_grad == b.requires_grad, name


def test_pickled_adapter_is_refused(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    (tmp_path / "adapter_model.bin").write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    with pytest.raises(InputError, match="safetensors"):
        load_adapter(tiny_llama(), str(tmp_path))
