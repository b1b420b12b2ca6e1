"""What is advised when memory runs out: flags that the command takes, for what is still open."""

from pathlib import Path
from typing import Any

import pytest

from lit_tune import run
from lit_tune.advice import advice, advice_lines
from tests.tiny_llama import tiny_base
from tests.tiny_run import write_records

SETTINGS: dict[str, Any] = {
    "method": "lora",
    "quantize": "none",
    "gradient_checkpointing": "none",
    "offload_activations": True,
    "optimizer": "adamw",
    "precision": "bf16-mixed",
    "on_gpu": True,
    "micro_batch_size": 8,
    "micro_batch_tokens": None,
    "global_batch_size": None,
    "accumulate_grad_batches": 3,
    "longest_sample": 1024,
}


def flags(**settings: Any) -> list[str]:
    return [change.flags for change in advice(**SETTINGS | settings)]


def test_lora_is_advised_smaller_batches_then_checkpointing_then_four_bits() -> None:
    assert flags() == [
        "--data.micro_batch_size 4 --trainer.accumulate_grad_batches 6",
        "--model.gradient_checkpointing full",
        "--model.quantize nf4",
        "--data.max_length 512",
    ]


def test_full_training_is_advised_another_optimizer_then_adapters() -> None:
    assert flags(method="fft", gradient_checkpointing="full", micro_batch_size=1) == [
        "--model.optimizer adamw_8bit",
        "--model.method lora",
        "--data.max_length 512",
    ]


def test_what_is_set_already_is_not_advised() -> None:
    assert flags(quantize="nf4", gradient_checkpointing="full", micro_batch_size=1) == ["--data.max_length 512"]
    assert flags(method="fft", optimizer="sgd", gradient_checkpointing="full")[1:] == [
        "--model.method lora",
        "--data.max_length 512",
    ]


@pytest.mark.parametrize(
    ("settings", "first"),
    [
        ({"micro_batch_size": 3}, "--data.micro_batch_size 1 --trainer.accumulate_grad_batches 9"),
        ({"global_batch_size": 24, "accumulate_grad_batches": 1}, "--data.micro_batch_size 4"),
        (
            {"global_batch_size": 24, "accumulate_grad_batches": 3},
            "--data.micro_batch_size 4 --trainer.accumulate_grad_batches 6",
        ),
        ({"micro_batch_tokens": 4096}, "--data.micro_batch_tokens 2048 --trainer.accumulate_grad_batches 6"),
        ({"micro_batch_tokens": 1500}, "--data.micro_batch_tokens 1024 --trainer.accumulate_grad_batches 6"),
        ({"micro_batch_tokens": 1024}, "--model.gradient_checkpointing full"),  # the longest sample must fit
    ],
)
def test_smaller_micro_batches_keep_the_optimizer_steps(settings: dict[str, Any], first: str) -> None:
    assert flags(**settings)[0] == first


def test_half_precision_is_advised_where_there_is_a_gpu() -> None:
    assert "--trainer.precision bf16-mixed" in flags(precision="32-true")
    assert "--trainer.precision bf16-mixed" not in flags(precision="32-true", on_gpu=False)


def test_changes_that_need_a_new_run_are_told_where_there_is_one_to_go_on() -> None:
    changes = advice(**SETTINGS)
    assert [line for line in advice_lines(changes, continues=False) if "a new run" in line] == []
    fresh = [line for line in advice_lines(changes, continues=True) if line.endswith("; a new run")]
    assert len(fresh) == 2
    assert advice_lines([], continues=True) == []


@pytest.mark.parametrize("method", ["lora", "fft"])
def test_every_flag_is_one_that_the_command_takes(working_directory: Path, method: str) -> None:
    tiny_base(working_directory / "base")
    path = write_records(working_directory / "records.jsonl")
    common = ["--model.base", "base", "--data.path", path, "--model.method", method, "--trainer.accelerator", "cpu"]
    for each in flags(method=method, precision="32-true"):
        run.build([*common, *each.split()], description="")
