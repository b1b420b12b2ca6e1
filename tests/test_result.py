"""What a run leaves, read by plain peft and transformers, must answer as the trained module does."""

import json
import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from lit_tune.data.instruct import InstructData, content_digest
from lit_tune.errors import SaveError
from lit_tune.modules import smollm2
from lit_tune.modules.llama import LlamaTuner
from lit_tune.modules.lora import Lora
from lit_tune.result import save_result, steps_of
from tests.tiny import tiny_sentencepiece_tokenizer, tiny_tokenizer
from tests.tiny_llama import tiny_base
from tests.tiny_run import train, write_records

INSTRUCTION = "Name the sea\n twice."
TOKENIZERS = {
    "bpe": tiny_tokenizer(),
    "bpe without bos": tiny_tokenizer(prepends_bos=False),
    "sentencepiece": tiny_sentencepiece_tokenizer("first"),
    "sentencepiece of old": tiny_sentencepiece_tokenizer("always"),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny_base(tmp_path_factory.mktemp("base")))


@pytest.fixture
def result(tmp_path: Path) -> Path:
    return tmp_path / "run" / "result"


def trained(
    base: str, tmp_path: Path, *, precision: str = "32-true", template: str = "alpaca", **settings: Any
) -> tuple[LlamaTuner, InstructData]:
    """Train for one epoch at a rate that moves the weights."""
    module = LlamaTuner(base=base, learning_rate=1e-2, **settings)
    data = InstructData(path=write_records(tmp_path / "records.jsonl"), template=template)
    train(module, data, precision=precision)
    return module, data


@torch.no_grad()
def logits(model: Any) -> Tensor:
    """Return the logits [1, T, V] of some tokens."""
    logits_BTV: Tensor = model.eval()(input_ids=torch.arange(3, 60)[None]).logits
    return logits_BTV


# Adapters -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["lora", "rslora", "dora", "pissa"])
def test_plain_peft_loads_the_adapter_and_gives_the_same_logits(
    base: str, tmp_path: Path, result: Path, variant: str
) -> None:
    lora = Lora(rank=4, targets="all-linear", variant=variant)  # type: ignore[arg-type]
    module, data = trained(base, tmp_path, lora=lora)
    save_result(module, data, result, precision="32-true")
    plain = AutoModelForCausalLM.from_pretrained(base)
    before = logits(plain)
    loaded = PeftModel.from_pretrained(plain, str(result))
    assert not torch.allclose(logits(loaded), before, rtol=0, atol=1e-2)
    # The same weights by the same arithmetic: no difference was seen; 1e-6 leaves room for another attention kernel.
    assert torch.allclose(logits(loaded), logits(module.model), rtol=0, atol=1e-6)


def test_the_adapter_names_its_base_so_that_peft_finds_it(base: str, tmp_path: Path, result: Path) -> None:
    module, data = trained(base, tmp_path)
    save_result(module, data, result, precision="32-true")
    config = json.loads((result / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(Path(base).resolve())
    assert (config["r"], config["lora_alpha"], sorted(config["target_modules"])) == (16, 32, ["q_proj", "v_proj"])


def test_an_adapter_of_the_default_base_names_its_directory(
    base: str, tmp_path: Path, result: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(smollm2, "prepared_directory", lambda: Path(base))
    module, data = trained("smollm2-135m", tmp_path)
    save_result(module, data, result, precision="32-true")
    assert json.loads((result / "adapter_config.json").read_text())["base_model_name_or_path"] == base


# Models ---------------------------------------------------------------------------------------------------------------


def test_plain_transformers_loads_the_model_and_gives_the_same_logits(base: str, tmp_path: Path, result: Path) -> None:
    module, data = trained(base, tmp_path, method="fft")
    save_result(module, data, result, precision="32-true")
    loaded = AutoModelForCausalLM.from_pretrained(result)
    assert loaded.dtype == torch.float32
    assert not torch.allclose(logits(loaded), logits(AutoModelForCausalLM.from_pretrained(base)), rtol=0, atol=1e-2)
    # The same weights by the same arithmetic: no difference was seen; 1e-6 leaves room for another attention kernel.
    assert torch.allclose(logits(loaded), logits(module.model), rtol=0, atol=1e-6)


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_a_model_trained_in_bf16_is_stored_in_bf16(base: str, tmp_path: Path, result: Path, precision: str) -> None:
    module, data = trained(base, tmp_path, method="fft", precision=precision)
    save_result(module, data, result, precision=precision)
    loaded = AutoModelForCausalLM.from_pretrained(result)
    assert loaded.dtype == torch.bfloat16
    for name, weight in module.model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], weight.bfloat16()), name


def test_the_model_stops_where_its_template_ends_an_answer(base: str, tmp_path: Path, result: Path) -> None:
    module, data = trained(base, tmp_path, method="fft", template="chatml")
    save_result(module, data, result, precision="32-true")
    loaded = AutoModelForCausalLM.from_pretrained(result)
    tokenizer = AutoTokenizer.from_pretrained(result)
    assert loaded.generation_config.eos_token_id == tokenizer.convert_tokens_to_ids(["</s>", "<|im_end|>"])


# Tokenizer and template -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("template", ["alpaca", "llama2", "llama3", "chatml"])
@pytest.mark.parametrize("kind", TOKENIZERS)
def test_the_saved_tokenizer_makes_the_prompts_of_training(
    tmp_path: Path, result: Path, kind: str, template: str
) -> None:
    base = tiny_base(tmp_path / "base", tokenizer=TOKENIZERS[kind])
    module, data = trained(str(base), tmp_path, template=template)
    save_result(module, data, result, precision="32-true")
    tokenizer = AutoTokenizer.from_pretrained(result)
    messages = [{"role": "user", "content": INSTRUCTION}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert prompt == data.encode_prompt(INSTRUCTION)
    assert (result / "prompt_template.jinja").read_text() == tokenizer.chat_template


def test_the_saved_template_trains_as_the_shipped_one_did(base: str, tmp_path: Path, result: Path) -> None:
    module, data = trained(base, tmp_path)
    save_result(module, data, result, precision="32-true")
    again = InstructData(path=data.path, template=str(result / "prompt_template.jinja"))
    ready, before = again.prepare(module.load_tokenizer), data.prepare(module.load_tokenizer)
    assert content_digest(ready.train) == content_digest(before.train)


# The steps behind it --------------------------------------------------------------------------------------------------


def test_a_result_knows_its_optimizer_steps(base: str, tmp_path: Path, result: Path) -> None:
    module, data = trained(base, tmp_path)
    save_result(module, data, result, precision="32-true")
    assert steps_of(result) == module.trainer.global_step == 5  # 19 records in steps of 4


@pytest.mark.parametrize("text", [None, "", "{", "[]", "{}", '{"optimizer_steps": null}', '{"optimizer_steps": "x"}'])
def test_a_result_without_them_is_none(tmp_path: Path, text: str | None) -> None:
    if text is not None:
        (tmp_path / "run.json").write_text(text)
    assert steps_of(tmp_path) is None


# What must not happen -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["lora", "fft"])
def test_weights_that_are_no_numbers_are_refused_and_the_earlier_result_stays(
    base: str, tmp_path: Path, result: Path, method: str
) -> None:
    module, data = trained(base, tmp_path, method=method)
    save_result(module, data, result, precision="32-true")
    earlier = {path.name: path.read_bytes() for path in result.iterdir()}
    with torch.no_grad():
        next(p for p in module.parameters() if p.requires_grad).flatten()[3] = float("nan")
    with pytest.raises(SaveError, match=r"result could not be written \(.* holds NaN or infinite values\)"):
        save_result(module, data, result, precision="32-true")
    assert list(result.parent.iterdir()) == [result]
    assert {path.name: path.read_bytes() for path in result.iterdir()} == earlier


@pytest.mark.parametrize("method", ["lora", "fft"])
def test_a_full_disk_is_a_fault_of_saving_and_leaves_the_earlier_result(
    base: str, tmp_path: Path, result: Path, method: str
) -> None:
    module, data = trained(base, tmp_path, method=method)
    save_result(module, data, result, precision="32-true")
    earlier = {path.name: path.read_bytes() for path in result.iterdir()}
    with largest_file(1000), pytest.raises(SaveError, match=r"File too large.*checkpoints are intact") as refused:
        save_result(module, data, result, precision="32-true")
    assert "\n" not in str(refused.value)
    assert {path.name: path.read_bytes() for path in result.iterdir()} == earlier
    assert list(result.parent.iterdir()) == [result]


@contextmanager
def largest_file(limit: int) -> Iterator[None]:
    """Let the kernel refuse to write more than `limit` bytes to a file."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
