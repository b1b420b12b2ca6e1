import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lit_tune import recipes
from lit_tune.errors import InputError
from lit_tune.plan import Target, plan
from tests.tiny_llama import tiny_base
from tests.tiny_run import write_records

Page = Callable[..., str]


@pytest.fixture
def page(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Page:
    """Return a function that runs `lit-tune plan` in an empty folder and returns what it prints."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")

    def run(*arguments: str) -> str:
        plan(list(arguments))
        assert list(tmp_path.glob("runs")) == []
        return capsys.readouterr().out

    return run


# The page -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(recipes.shipped()))
def test_every_recipe_has_a_page(name: str, page: Page) -> None:
    said = page("--config", name, "--tokens", "512")
    for word in ("Plan: ", "Micro-batch: ", "weights", "gradients", "optimizer", "activations", "other", "the peak is"):
        assert word in said
    assert re.search(r"compute +[\d.,]+ GFLOP a token", said)
    assert re.search(r"fits on a GPU of \d+ GiB", said)


def test_the_largest_micro_batch_of_the_records_is_planned_for(tmp_path: Path, page: Page) -> None:
    base = str(tiny_base(tmp_path / "base"))
    records = write_records(tmp_path / "records.jsonl")
    said = page("--model.base", base, "--data.path", str(records), "--data.micro_batch_size", "2")
    assert "Micro-batch: 2 samples" in said
    assert "No tokenizer" not in said


def test_without_a_tokenizer_samples_are_as_long_as_they_may_be(page: Page) -> None:
    said = page("--model.base", "llama3.2-1b", "--data.max_length", "300", "--data.micro_batch_size", "3")
    assert "No tokenizer of this base is here: every sample is taken to be data.max_length long." in said
    assert "Micro-batch: 3 samples, 900 tokens" in said


def test_what_does_not_fit_is_told_with_what_would(page: Page) -> None:
    said = page("--model.base", "llama2-7b", "--tokens", "2048", "--gpu-gib", "16")
    assert "does NOT fit on a GPU of 16.00 GiB" in said
    assert "--model.gradient_checkpointing full" in said
    assert "fits on a GPU of 24.00 GiB" in page("--model.base", "llama2-7b", "--tokens", "2048", "--gpu-gib", "24")


def test_what_nothing_makes_fit_is_told(page: Page) -> None:
    said = page("--model.base", "llama2-7b", "--tokens", "2048", "--gpu-gib", "2")
    assert "No change that is known here makes it fit" in said


def test_the_largest_batch_is_found(tmp_path: Path, page: Page) -> None:
    base = str(tiny_base(tmp_path / "base"))
    common = ("--model.base", base, "--data.path", write_records(tmp_path / "records.jsonl"), "--gpu-gib", "0.6")
    said = page(*common, "--find-batch")
    found = re.search(r"The largest micro-batch that fits: (\d+) samples of \d+ tokens", said)
    assert found
    size = int(found[1])
    budget = re.search(r"--data.micro_batch_tokens (\d+)\)", said)
    assert budget
    assert int(budget[1]) > size
    # All of these tokens are supervised, not a share of them as in the records.
    assert "fits on a GPU" in page(*common, "--tokens", str(int(budget[1]) // 4))
    assert "does NOT fit" in page(*common, "--tokens", str(int(budget[1]) * 4))


def test_full_fine_tuning_on_several_gpus_is_planned_in_shards(page: Page) -> None:
    settings = ("--model.base", "llama3.2-1b", "--model.method", "fft", "--tokens", "64")
    one, four = page(*settings), page(*settings, "--trainer.devices", "4")
    assert "on each of 4 GPUs, fsdp2" in four

    def weights(said: str) -> float:
        return float(re.findall(r"weights +[\d.]+ +([\d.]+)", said)[0])

    assert weights(four) == pytest.approx(weights(one) / 4, rel=0.01)


@pytest.mark.parametrize("tokens", ["1", "-5"])
def test_tokens_without_a_meaning_are_refused(tokens: str, page: Page) -> None:
    with pytest.raises(InputError, match=f"--tokens is {tokens}; it must be 2 or more"):
        page("--model.base", "llama2-7b", "--tokens", tokens)


@pytest.mark.parametrize("size", ["-3", "0", "0.5"])
def test_a_gpu_without_memory_is_refused(size: str, page: Page) -> None:
    with pytest.raises(InputError, match=f"--gpu-gib is {size}; it must be more than the 0.5 of CUDA itself"):
        page("--model.base", "llama2-7b", "--tokens", "64", "--gpu-gib", size)


@pytest.mark.parametrize(
    ("trainer", "expected"),
    [
        ({}, ("cuda", "bf16-mixed", 1)),
        ({"devices": 4, "num_nodes": 2}, ("cuda", "bf16-mixed", 8)),
        ({"devices": [0, 3], "precision": "16-mixed"}, ("cuda", "16-mixed", 2)),
        ({"devices": "0,1,2"}, ("cuda", "bf16-mixed", 3)),
        ({"accelerator": "cpu", "precision": "32-true"}, ("cpu", "32-true", 1)),
    ],
)
def test_the_target_need_not_be_this_machine(trainer: dict[str, Any], expected: tuple[Any, ...]) -> None:
    left_out = {"accelerator": "auto", "precision": None, "devices": "auto", "num_nodes": 1, "strategy": "auto"}
    settings = {"trainer": left_out | trainer}
    target = Target()
    target.take(settings)
    assert (target.device, target.precision, target.devices) == expected
    assert settings["trainer"]["accelerator"] == "cpu"
