"""Adapters: how many parameters, in which dtype, beside which layers."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from lit_tune.errors import InputError
from lit_tune.modules.load import load_config
from lit_tune.modules.lora import Lora, apply_lora, count_parameters, load_adapter
from tests.tiny_llama import tiny_base, tiny_llama


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


@pytest.mark.parametrize(
    "settings", [{"rank": 0}, {"alpha": 0}, {"alpha": float("nan")}, {"dropout": 1.0}, {"targets": []}]
)
def test_impossible_settings_are_refused(settings: dict[str, object]) -> None:
    with pytest.raises(InputError, match=r"model\.lora\."):
        Lora(**settings)  # type: ignore[arg-type]


@pytest.mark.parametrize("variant", ["lora", "rslora", "dora", "pissa"])
@pytest.mark.parametrize("bias", ["none", "all"])
def test_loaded_adapter_trains_and_is_the_saved_one(tmp_path: Path, variant: str, bias: str) -> None:
    settings = {"variant": variant, "bias": bias, "targets": "all-linear"}
    saved = apply_lora(tiny_llama(), Lora(rank=2, **settings))  # type: ignore[arg-type]
    with torch.no_grad():
        for parameter in saved.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter))
    saved.save_pretrained(str(tmp_path))
    # PEFT's own reading is what ours must come out at.
    theirs = PeftModel.from_pretrained(tiny_llama(), str(tmp_path), is_trainable=True)
    loaded = load_adapter(tiny_llama(), str(tmp_path))
    for (name, a), (other, b), (_, c) in zip(
        saved.named_parameters(), theirs.named_parameters(), loaded.named_parameters(), strict=True
    ):
        assert name == other
        assert torch.equal(a, c), name
        assert torch.equal(b, c), name
        assert (a.requires_grad, a.dtype) == (c.requires_grad, c.dtype), name


def test_pickled_adapter_is_refused(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    (tmp_path / "adapter_model.bin").write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    with pytest.raises(InputError, match="safetensors"):
        load_adapter(tiny_llama(), str(tmp_path))


def made(directory: Path, **config: Any) -> Path:
    """Write an adapter as plain PEFT makes it, and set values in its configuration."""
    get_peft_model(tiny_llama(), LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(str(directory))
    file = directory / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | config))
    return directory


@pytest.mark.parametrize(
    "config",
    [
        {"task_type": "CAUSAL_LM"},
        {"auto_mapping": None},
        {"peft_version": "0.4.0"},
        {"base_model_name_or_path": "meta-llama/Llama-2-7b-hf"},  # not on this machine: the tensors decide
        {"base_model_name_or_path": "/not/here"},
    ],
)
def test_an_adapter_of_plain_peft_is_taken(tmp_path: Path, config: dict[str, Any]) -> None:
    loaded = load_adapter(tiny_llama(), str(made(tmp_path, **config)))
    assert [name for name, parameter in loaded.named_parameters() if parameter.requires_grad]


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"peft_type": "IA3"}, "peft_type 'IA3'; only LORA can be used"),
        ({"megatron_config": {"a": 1}}, "sets megatron_config, which no plain LoRA needs; set it to null"),
        ({"auto_mapping": {"parent_library": "os"}}, "names the module 'os'"),
        ({"loader": "os.system"}, "sets loader, "),
        ({"init_lora_weights": "eva"}, "init_lora_weights to 'eva'"),
        ({"target_modules": "(a+)+"}, "has the pattern '(a+)+' as target_modules"),
        ({"rank_pattern": {"q.*": 2}}, "has the pattern 'q.*' as rank_pattern"),
        ({"r": 4}, "its weights have the ranks [2], its adapter_config.json says [4]"),
        ({"target_modules": ["k_proj"]}, "it lacks base_model.model.model.layers.0.self_attn.k_proj.lora_A.weight"),
        ({"use_dora": True}, "it lacks base_model.model.model.layers.0.self_attn.q_proj.lora_magnitude_vector"),
    ],
)
def test_an_adapter_that_is_no_plain_lora_is_refused(tmp_path: Path, config: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=re.escape(said)):
        load_adapter(tiny_llama(), str(made(tmp_path, **config)))


def test_an_adapter_of_another_vocabulary_is_refused_with_both_sizes_and_bases(tmp_path: Path) -> None:
    config = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])
    other = get_peft_model(tiny_llama(vocabulary=305), config)
    other.peft_config["default"].base_model_name_or_path = "some/model"
    other.save_pretrained(str(tmp_path / "adapter"))
    base = tiny_base(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(base)
    with pytest.raises(InputError, match=r"lm_head\.weight is \(305, 32\) there and \(273, 32\) here") as refused:
        load_adapter(model, str(tmp_path / "adapter"))
    assert f"does not fit this base model {base} (it was trained on 'some/model')" in str(refused.value)


def test_an_adapter_whose_own_base_is_here_fits_that_base_only(tmp_path: Path) -> None:
    own, other = tiny_base(tmp_path / "own", seed=1), tiny_base(tmp_path / "other", seed=2)
    adapter = tmp_path / "adapter"
    get_peft_model(AutoModelForCausalLM.from_pretrained(own), LoraConfig(r=2)).save_pretrained(str(adapter))
    load_adapter(AutoModelForCausalLM.from_pretrained(own), str(adapter))
    with pytest.raises(InputError, match="that is another model") as refused:
        load_adapter(AutoModelForCausalLM.from_pretrained(other), str(adapter))
    assert str(own) in str(refused.value)
    assert str(other) in str(refused.value)
