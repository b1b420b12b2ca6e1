"""Bases: what is read of a model's directory, and what is refused because it would be guessed, run or left out."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from lit_tune.errors import InputError
from lit_tune.modules.load import base_directory, load_config, load_llama, load_tokenizer, local_directory
from tests.tiny import tiny_tokenizer
from tests.tiny_llama import tiny_base, tiny_llama

WEIGHT = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return tiny_base(tmp_path / "base")


def change(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def load(base: Path, **settings: Any) -> torch.nn.Module:
    return load_llama(base_directory(str(base)), dtype=torch.float32, **settings)


def test_the_weights_are_those_that_transformers_reads(base: Path) -> None:
    theirs = AutoModelForCausalLM.from_pretrained(base).state_dict()
    ours = load(base).state_dict()
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[name], ours[name]) for name in theirs)


@pytest.mark.parametrize("tied", [True, False])
def test_weights_in_several_files_are_read(tmp_path: Path, tied: bool) -> None:
    tiny_llama(tied=tied).save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    expected = tiny_llama(tied=tied).state_dict()
    assert all(torch.equal(weight, expected[name]) for name, weight in load(tmp_path).state_dict().items())


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (lambda weights: weights.pop(WEIGHT), f"1 weights are missing, such as {WEIGHT}"),
        (lambda weights: weights.update({WEIGHT: torch.ones(3, 4)}), f"{WEIGHT} has the shape (3, 4), but its"),
        (lambda weights: weights.update({WEIGHT: torch.ones(32, 32, dtype=torch.int32)}), f"{WEIGHT} is I32; weights"),
        (lambda weights: weights.update({"model.layers.7.a": torch.ones(3)}), "has no place for model.layers.7.a"),
    ],
    ids=["missing", "shape", "dtype", "more"],
)
def test_weights_that_do_not_fit_are_refused_and_never_made_up(
    base: Path, edit: Callable[[dict[str, torch.Tensor]], Any], said: str
) -> None:
    weights = load_file(base / "model.safetensors")
    edit(weights)
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=re.escape(said)):
        load(base)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "../other/model.safetensors", "/model.safetensors", None, 3])
def test_an_index_names_safetensors_beside_it_only(base: Path, name: Any) -> None:
    (base / "model.safetensors").rename(base / "shard.safetensors")
    (base / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {WEIGHT: name}}))
    with pytest.raises(InputError, match=r"as a file of weights; only \.safetensors files beside its "):
        base_directory(str(base))


def test_a_missing_file_of_several_is_named(tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path, max_shard_size="20KB")
    missing = sorted(tmp_path.glob("*.safetensors"))[1]
    missing.unlink()
    with pytest.raises(InputError, match=rf"lacks {missing.name}, which model.safetensors.index.json names; copy"):
        base_directory(str(tmp_path))


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"architectures": ["BertModel"]}, "is a BertModel, not a causal language model"),
        ({"num_hidden_layers": 10**7}, "says num_hidden_layers 10000000; at most 1000 is possible"),
        ({"_attn_implementation": "some/kernel"}, "names code of a hub, _attn_implementation 'some/kernel'"),
        ({"model_type": "evil"}, "config.json describes no model: "),
        ({"hidden_size": "wide"}, "config.json describes no model: "),
        ({"num_attention_heads": 0}, "config.json describes no model: "),
    ],
)
def test_a_configuration_that_is_none_is_refused(base: Path, values: dict[str, Any], said: str) -> None:
    change(base / "config.json", **values)
    with pytest.raises(InputError, match=re.escape(said)):
        load_config(str(base))


@pytest.mark.parametrize("text", ["", "[]", "null", "[" * 10**5, '{"a": ' + "9" * 5000 + "}"], ids=range(5))
@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json"])
def test_a_file_that_is_no_json_object_is_refused(base: Path, name: str, text: str) -> None:
    (base / name).write_text(text)
    with pytest.raises(InputError, match=r"model\.base: ") as refused:
        load_tokenizer(base_directory(str(base)))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("name", ["nope", "some/kernel", "paged|eager", ""])
def test_an_attention_that_is_none_is_refused_with_the_choices(base: Path, name: str) -> None:
    with pytest.raises(InputError, match=r"model\.attention: .* is not valid; use one of auto, eager, .*sdpa"):
        load(base, attention_name=name)


def test_a_tokenizer_with_more_tokens_than_embeddings_is_refused_with_both(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    base = tiny_base(tmp_path, tokenizer=tokenizer)
    tokenizer.add_tokens(["<extra>"])
    tokenizer.save_pretrained(base)
    with pytest.raises(InputError, match=r"has 274 tokens, its model 273 embeddings, none for '<extra>'"):
        load_tokenizer(str(base))


def test_a_missing_pad_token_is_eos_and_changes_nothing_else(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = None
    loaded = load_tokenizer(str(tiny_base(tmp_path, tokenizer=tokenizer)))
    assert (loaded.pad_token, loaded.pad_token_id) == (loaded.eos_token, loaded.eos_token_id)
    assert len(loaded) == len(tokenizer)


def test_a_base_is_found_on_this_machine_only_where_it_is_whole(base: Path, tmp_path: Path) -> None:
    assert local_directory(str(base)) == str(base)
    assert local_directory(str(tmp_path)) is None  # no model
    assert local_directory("some/model") is None  # not in the cache
    assert local_directory("no hub id: ../..") is None
    assert local_directory("") is None
